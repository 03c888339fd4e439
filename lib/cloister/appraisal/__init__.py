# SPDX-License-Identifier: Apache-2.0
"""Is an authentic TD acceptable? Policies, reference values and the judgement, all pure.

policy.py      the appraisal policy: closed YAML -> `TdPolicy`
references.py  named, versioned sets of reference values
judge.py       verdict + policy + reference sets + time -> checks and trust vector
checklist.py   checks in their order, and the refusal that names the first that failed
"""
