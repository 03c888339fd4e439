# SPDX-License-Identifier: Apache-2.0
"""May this workload have this key? Policies and the decision, all pure: the broker and the owner's CLI share them.

keys.py     purposes and states of keys, what a role may ask for
policy.py   the release policy: closed YAML -> `ReleasePolicy`
claims.py   the example cases a policy carries
cases.py    what becomes of them
explain.py  what a policy makes of a token, or would have made of a logged request
difference.py  what changes from one policy to another, and whether it lets more pass
blocks.py   one check with what it wanted and got; the verdict over all of them
approvals.py  signatures of those whom a policy asks
decide.py   request + attestation result + policy + key + counters + time -> blocks, and the denial in people's words
"""
