# SPDX-License-Identifier: Apache-2.0
"""The product's own sample: Chinese review sentences about hotels, laptops and books, labelled 1 (good) or 0 (bad).

The label is the polarity of the last clause. Two clauses may contradict each other, and a clause may negate the
antonym ("not dirty"), so that single words mislead and a model has to learn order. Every choice comes from SHA-256 of
seed, row, attempt and slot: the files are the same bytes under every version of Python.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister.atomicfile import file_error, write_atomically
from cloister.errors import CloisterError, Code

HEADER: Final = "label\ttext_a\n"
DEFAULT_SEED: Final = "cloister-sample-v1"
DEFAULT_ROWS: Final = 3600
# Ten of twelve rows train, one of twelve each is for dev and test.
_PARTS: Final = 12
_MAX_ROWS: Final = 20_000  # the templates give many more sentences, but not endlessly many

# Domain -> aspect -> pairs of a good word and its antonym.
_ASPECTS: Final[Mapping[str, Mapping[str, Sequence[tuple[str, str]]]]] = {
    "酒店": {
        "房间": (("干净", "肮脏"), ("宽敞", "狭小"), ("明亮", "昏暗")),
        "服务": (("热情", "冷淡"), ("周到", "敷衍")),
        "前台": (("礼貌", "粗鲁"), ("耐心", "急躁")),
        "早餐": (("丰盛", "单调"), ("可口", "难吃")),
        "位置": (("方便", "偏僻"), ("优越", "糟糕")),
        "床铺": (("舒适", "难受"), ("柔软", "僵硬")),
        "浴室": (("整洁", "邋遢"), ("干爽", "潮湿")),
        "价格": (("实惠", "昂贵"), ("公道", "离谱")),
        "隔音": (("出色", "差劲"),),
        "大堂": (("气派", "寒酸"), ("安静", "吵闹")),
    },
    "电脑": {
        "屏幕": (("清晰", "模糊"), ("细腻", "粗糙")),
        "键盘": (("舒服", "别扭"), ("灵敏", "迟钝")),
        "电池": (("耐用", "脆弱"), ("持久", "短命")),
        "散热": (("优秀", "拙劣"),),
        "做工": (("精致", "粗劣"), ("结实", "松散")),
        "系统": (("流畅", "卡顿"), ("稳定", "混乱")),
        "外观": (("漂亮", "丑陋"), ("时尚", "老土")),
        "机身": (("轻便", "笨重"),),
        "速度": (("飞快", "缓慢"),),
        "客服": (("专业", "外行"), ("负责", "推诿")),
    },
    "书": {
        "内容": (("充实", "空洞"), ("深刻", "肤浅")),
        "文笔": (("优美", "拗口"), ("生动", "枯燥")),
        "情节": (("紧凑", "拖沓"), ("精彩", "乏味")),
        "纸张": (("厚实", "单薄"), ("光滑", "毛糙")),
        "翻译": (("准确", "离奇"), ("自然", "生硬")),
        "排版": (("合理", "杂乱"), ("美观", "难看")),
        "包装": (("完好", "破损"), ("牢固", "松垮")),
        "观点": (("新颖", "陈旧"),),
    },
}
_OPENINGS: Final[Mapping[str, Sequence[str]]] = {
    "酒店": ("", "", "", "上周入住，", "出差住了两晚，", "这家酒店的", "全家一起住的，"),
    "电脑": ("", "", "", "用了一个月，", "昨天到货，", "这台电脑的", "给家人买的，"),
    "书": ("", "", "", "周末读完了，", "朋友推荐的，", "这本书的", "刚刚收到，"),
}
_CLOSINGS: Final = ("。", "。", "。", "！", "，仅供参考。", "，个人看法。", "，说说感受。")
_DEGREES: Final = ("很", "非常", "特别", "相当", "十分", "挺", "确实", "真的")
_NEGATORS: Final = ("不", "并不", "不太", "一点也不", "不怎么", "不算")
_AGREEING: Final = ("，而且", "，并且", "，同时", "，另外")
_CONTRASTING: Final = ("，但是", "，不过", "，可是", "，然而")
_CONCESSIVES: Final = ("", "", "虽然", "尽管")


@dataclass(frozen=True, slots=True)
class _Choices:
    """The choices of one attempt at one row."""

    seed: str
    row: int
    attempt: int

    def number(self, slot: str, below: int) -> int:
        digest = hashlib.sha256(f"{self.seed}|{self.row}|{self.attempt}|{slot}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % below

    def one(self, slot: str, options: Sequence[str]) -> str:
        return options[self.number(slot, len(options))]


def _clause(choices: _Choices, slot: str, aspect: str, pairs: Sequence[tuple[str, str]], *, good: bool) -> str:
    pair = pairs[choices.number(f"{slot}.pair", len(pairs))]
    if choices.number(f"{slot}.negated", 100) < 25:
        return aspect + choices.one(f"{slot}.negator", _NEGATORS) + pair[1 if good else 0]
    return aspect + choices.one(f"{slot}.degree", _DEGREES) + pair[0 if good else 1]


def _sentence(choices: _Choices, *, good: bool) -> str:
    domain = choices.one("domain", tuple(_ASPECTS))
    aspects = _ASPECTS[domain]
    names = tuple(aspects)
    last = choices.number("aspect", len(names))
    opening = choices.one("opening", _OPENINGS[domain])
    ending = choices.one("closing", _CLOSINGS)
    shape = choices.number("shape", 100)
    last_clause = _clause(choices, "last", names[last], aspects[names[last]], good=good)
    if shape < 45:
        return opening + last_clause + ending
    # Another aspect than the last clause's.
    first = names[(last + 1 + choices.number("other", len(names) - 1)) % len(names)]
    agrees = shape < 70
    first_clause = _clause(choices, "first", first, aspects[first], good=good == agrees)
    if agrees:
        return opening + first_clause + choices.one("joiner", _AGREEING) + last_clause + ending
    # "虽然" stands before a subject, not after "这家酒店的".
    concession = "" if opening.endswith("的") else choices.one("concession", _CONCESSIVES)
    return opening + concession + first_clause + choices.one("joiner", _CONTRASTING) + last_clause + ending


def sample_rows(*, seed: str = DEFAULT_SEED, rows: int = DEFAULT_ROWS) -> list[tuple[int, str]]:
    """Return distinct labelled sentences; of rows 2k and 2k + 1 one is good and one is bad.

    Raises CloisterError(ARGUMENT_INVALID) unless `rows` is a multiple of 24 up to 20,000.
    """
    if rows % (2 * _PARTS) or not 0 < rows <= _MAX_ROWS:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what=f"a sample of {rows} rows cannot be made",
            why=f"each of its three files is balanced: a multiple of {2 * _PARTS} rows, at most {_MAX_ROWS}",
            todo="ask for 3600 rows, for example",
        )
    made: list[tuple[int, str]] = []
    seen: set[str] = set()
    for row in range(rows):
        label = (_Choices(seed, row // 2, 0).number("label", 2) + row) % 2
        attempt = 0
        while (text := _sentence(_Choices(seed, row, attempt), good=label == 1)) in seen:
            attempt += 1
        seen.add(text)
        made.append((label, text))
    return made


def generate_sample(directory: Path, *, seed: str = DEFAULT_SEED, rows: int = DEFAULT_ROWS) -> dict[str, int]:
    """Write train.tsv, dev.tsv and test.tsv (10 : 1 : 1), each balanced; return rows per file."""
    made = sample_rows(seed=seed, rows=rows)
    part = rows // _PARTS
    files = {"train.tsv": made[: -2 * part], "dev.tsv": made[-2 * part : -part], "test.tsv": made[-part:]}
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise file_error(error, what=f"cannot write the sample into {directory}") from error
    for name, content in files.items():
        text = HEADER + "".join(f"{label}\t{text}\n" for label, text in content)
        write_atomically(directory / name, text.encode(), mode=0o644)
    return {name: len(content) for name, content in files.items()}
