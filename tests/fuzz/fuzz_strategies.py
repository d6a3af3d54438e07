"""Hypothesis strategies: valid files damaged byte by byte, and structures that lie."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from typing import Any

from fuzz_targets import join_safetensors, split_safetensors
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

TOTAL = int(os.environ.get("SPIGAN_FUZZ", "0"))
"""Cases of the long mode in all; 0: the short one, the same few hundred cases every time."""


def cases(weight: int) -> Callable[[Any], Any]:
    """Decorator: a share of the cases. The weights of all tests add up to about 600, the cases of the short mode."""
    count = weight if not TOTAL else max(weight, round(TOTAL * weight / 600))
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=not TOTAL,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


# ---- Bytes ----


@st.composite
def damaged(draw: st.DrawFn, examples: list[bytes]) -> bytes:
    """One of the examples, cut short, with flipped bits, or with parts overwritten, put in, taken out or repeated."""
    data = bytearray(draw(st.sampled_from(examples)))
    near = st.integers(0, min(len(data), 512))  # headers are where the structure is
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.one_of(near, st.integers(0, max(0, len(data)))))
        match draw(st.sampled_from(["cut", "flip", "flip", "put", "put", "insert", "remove", "repeat"])):
            case "cut":
                del data[at:]
            case "flip" if data:
                data[at % len(data)] ^= 1 << draw(st.integers(0, 7))
            case "put":
                piece = draw(pieces)
                data[at : at + len(piece)] = piece
            case "insert":
                data[at:at] = draw(pieces)
            case "remove":
                del data[at : at + draw(st.integers(1, 64))]
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 256))] * draw(st.integers(1, 4))
    return bytes(data)


extremes = [0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**64 - 1]
pieces = st.one_of(
    st.binary(min_size=1, max_size=16),
    st.sampled_from([struct.pack("<Q", v) for v in extremes]),
    st.sampled_from([struct.pack(">I", v & 0xFFFFFFFF) for v in extremes]),
    st.sampled_from([struct.pack("<H", v & 0xFFFF) for v in extremes]),
)

# ---- JSON ----

# What makes an example is called by the tests, not when they are collected: some train a run.

POWERS = [2**n + d for n in (14, 16, 20, 31, 53, 63, 64) for d in (-1, 0)]
numbers = st.sampled_from(
    [0, -1, 1, 2, 3, 1000, *POWERS, 10**30, -(2**63), 0.5, -0.5, 1e-320, 1e300, float("nan"), float("inf")]
)
texts = st.one_of(
    st.sampled_from(["", " ", "../x", "/etc/passwd", "a\0b", "\x1b[31m", "\ud800", "nan", "1", "x" * 5000, "-x", "~x"]),
    st.text(max_size=8),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=4,
)


def bombs(key: str = "a") -> st.SearchStrategy[bytes]:
    """Texts that parsers of JSON stumble over."""
    return st.sampled_from([
        b"", b" ", b"null", b"[]", b"1", b'"x"', b"{", b"[" * 100_000, b'{"a":' * 100_000, b"[" * 900 + b"]" * 900,
        b"[" * 100_000 + b"]" * 100_000, f'{{"{key}": {"1" * 100_000}}}'.encode(), f'{{"{key}": 1e999}}'.encode(),
        f'{{"{key}": NaN}}'.encode(), f'{{"{key}": 1, "{key}": 2}}'.encode(), b"\xef\xbb\xbf{}", "{}".encode("utf-16"),
        b'{"\\ud800": 1}', b'{"\x00": 1}', b"\xff\xfe\x00", b"{}" + b" " * (1 << 21), b"\0" * (1 << 21),
        f'{{"{key}": "{"x" * (1 << 21)}"}}'.encode(), json.dumps({f"f{i}": 1 for i in range(20_000)}).encode(),
    ])  # fmt: skip


@st.composite
def lying_json(draw: st.DrawFn, example: Callable[[], bytes]) -> bytes:
    """A JSON object with some of its values (of any depth) replaced, removed or added."""
    if draw(st.integers(0, 9)) == 0:
        return draw(bombs())
    content = json.loads(example())
    for _ in range(draw(st.integers(1, 3))):
        target = content
        while True:
            key = draw(st.sampled_from([*target, "new"]))
            if isinstance(target.get(key), dict) and target[key] and draw(st.booleans()):
                target = target[key]
                continue
            break
        match draw(st.integers(0, 9)):
            case 0:
                target.pop(key, None)
            case 1:
                target[draw(texts)] = draw(values)
            case 2 | 3 | 4 | 5:
                target[key] = draw(numbers)
            case _:
                target[key] = draw(values)
    return json.dumps(content).encode()


# ---- safetensors ----

DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "C64", "U64", "X", "", 7, None]
dimensions = st.one_of(
    st.integers(0, 9), st.sampled_from([-1, 2**20, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 1.5, "4", None, [1]])
)


@st.composite
def lying_safetensors(draw: st.DrawFn, example: Callable[[], bytes]) -> bytes:
    """A safetensors file whose header lies: lengths, dtypes, shapes, offsets, names, metadata."""
    header, data = split_safetensors(example())
    names = [name for name in header if name != "__metadata__"]
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(names))
        entry = header.get(name)
        entry = entry if isinstance(entry, dict) else None  # not what "value" has put there
        match draw(st.sampled_from(["dtype", "shape", "offsets", "rename", "remove", "add", "metadata", "value"])):
            case "dtype" if entry:
                entry["dtype"] = draw(st.sampled_from(DTYPES))
            case "shape" if entry:
                entry["shape"] = draw(st.lists(dimensions, max_size=5))
            case "offsets" if entry:
                entry["data_offsets"] = draw(st.lists(st.sampled_from([*extremes, -1, len(data), "0"]), max_size=3))
            case "rename" if entry:
                header[draw(texts)] = header.pop(name)
            case "remove":
                header.pop(name, None)
            case "add":
                shape = draw(st.lists(dimensions, max_size=3))
                header[draw(texts)] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data)]}
            case "metadata":
                header["__metadata__"] = draw(values)
            case "value":
                header[name] = draw(values)
    length = draw(st.one_of(st.none(), st.none(), st.none(), st.sampled_from(extremes)))
    text: Any = header
    if draw(st.integers(0, 9)) == 0:
        text = draw(bombs())
    return join_safetensors(text, data, length)


@st.composite
def wrong_tensors(draw: st.DrawFn, example: Callable[[], bytes]) -> bytes:
    """A sound safetensors file, of other tensors: other dtypes, shapes, names; values that are not finite."""
    import torch
    from safetensors.torch import load, save

    data = example()
    tensors, metadata = load(data), split_safetensors(data)[0].get("__metadata__")
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(tensors)))
        tensor = tensors[name]
        match draw(st.sampled_from(["dtype", "shape", "value", "remove", "add", "grow"])):
            case "dtype":
                kind = draw(st.sampled_from([torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8,
                                             torch.bool, torch.float8_e4m3fn, torch.complex64]))  # fmt: skip
                tensors[name] = tensor.to(kind)
            case "shape":
                shapes = [(-1,), (1, -1), tensor.shape[::-1], (*tensor.shape, 1), (0,), (2**40, 0), ()]
                shape = draw(st.sampled_from(shapes))
                tensors[name] = (
                    tensor.reshape(shape) if shape not in ((0,), (2**40, 0), ()) else tensor.new_zeros(shape)
                )
            case "value":
                if tensor.is_floating_point() and tensor.numel():
                    tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = draw(
                        st.sampled_from([float("nan"), float("inf"), float("-inf"), 3e38])
                    )
            case "remove" if len(tensors) > 1:
                del tensors[name]
            case "add":
                tensors[draw(st.sampled_from(["new", "mapping.new", "optimizer_g.0.new", "optimizer_g.999.step",
                    "optimizer_g.x.y", "optimizer_g.0", "statistics.x", "ada_signs", "model.", "rng.cuda"]))] = (
                    torch.zeros(draw(st.sampled_from([(), (0,), (1,), (2, 2)])))
                )  # fmt: skip
            case "grow":
                tensors[name] = torch.cat([tensor.reshape(-1)] * 2)
    return save(tensors, metadata)


# ---- Images ----


def png_chunks(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of chunks, each with its checksum."""
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@st.composite
def lying_images(draw: st.DrawFn) -> bytes:
    """Images whose headers claim what is not there: sizes up to 2^31, odd depths, frames, text that grows."""
    side = st.sampled_from([0, 1, 2, 8, 1000, 8192, 60_000, 65_535, 65_536, 2**31 - 1])
    width, height = draw(side), draw(side)
    kind = draw(st.sampled_from(["png", "png", "bmp", "gif", "jpeg", "tiff", "webp"]))
    if kind == "png":
        depth, colour = draw(st.sampled_from([1, 2, 4, 8, 16, 3, 0])), draw(st.sampled_from([0, 2, 3, 4, 6, 5]))
        rows = zlib.compress(bytes(draw(st.sampled_from([0, 10, 1 << 16, 1 << 24]))), 1)
        grown = zlib.compress(bytes(1 << 24), 9)
        extra = draw(st.lists(st.sampled_from([
            (b"zTXt", b"k\0\0" + grown), (b"iCCP", b"k\0\0" + grown), (b"iTXt", b"k\0\1\0\0\0" + grown),
            (b"acTL", struct.pack(">II", 2**31 - 1, 0)), (b"acTL", struct.pack(">II", 2, 0)), (b"PLTE", b"123"),
            (b"tRNS", b"\0" * 300), (b"eXIf", b"MM\0*\xff\xff\xff\xff"), (b"IDAT", b""), (b"gAMA", b""),
        ]), max_size=3))  # fmt: skip
        header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, draw(st.integers(0, 1)))
        return png_chunks((b"IHDR", header), *extra, (b"IDAT", rows), (b"IEND", b""))
    if kind == "bmp":
        bits, compression = draw(st.sampled_from([1, 4, 8, 16, 24, 32, 64])), draw(st.integers(0, 4))
        body = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, draw(numbers_u32), 0)
        return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + body + bytes(64)
    if kind == "gif":
        screen = struct.pack("<HHBBB", width & 0xFFFF, height & 0xFFFF, 0x80, 0, 0) + bytes(6)
        frame = b"," + struct.pack("<HHHHB", 0, 0, width & 0xFFFF, height & 0xFFFF, 0) + b"\x02\x02\x44\x01\x00"
        return b"GIF89a" + screen + frame * draw(st.sampled_from([1, 2, 2000])) + b";"
    if kind == "jpeg":
        components = draw(st.sampled_from([0, 1, 3, 4, 200]))
        body = struct.pack(">BHHB", draw(st.sampled_from([8, 12, 0])), height & 0xFFFF, width & 0xFFFF, components)
        body += b"\x01\x11\x00" * (components % 5)
        return (
            b"\xff\xd8\xff"
            + bytes([draw(st.sampled_from([0xC0, 0xC2, 0xC3]))])
            + struct.pack(">H", len(body) + 2)
            + body
            + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
            + bytes(64)
        )
    if kind == "webp":
        body = b"VP8X" + struct.pack("<I", 10) + bytes([draw(st.integers(0, 255)), 0, 0, 0])
        body += struct.pack("<I", width & 0xFFFFFF)[:3] + struct.pack("<I", height & 0xFFFFFF)[:3]
        body += b"VP8L" + bytes(12)
        return b"RIFF" + struct.pack("<I", draw(numbers_u32)) + b"WEBP" + body
    tags = {256: width, 257: height, 258: draw(st.sampled_from([1, 8, 16, 32])),
            259: draw(st.sampled_from([1, 5, 7, 8])), 262: draw(st.integers(0, 6)), 273: 8,
            277: draw(st.sampled_from([1, 3, 4, 200])), 278: height,
            279: draw(numbers_u32), 322: draw(numbers_u32), 323: draw(numbers_u32)}  # fmt: skip
    entries = [
        struct.pack("<HHII", tag, 4, draw(st.sampled_from([1, 1, 1, 2**31])), v) for tag, v in sorted(tags.items())
    ]
    after = draw(st.sampled_from([0, 8, 8]))  # 8: a directory that is its own successor
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + struct.pack("<I", after) + bytes(64)


numbers_u32 = st.sampled_from([0, 1, 16, 256, 2**16, 2**31 - 1, 2**32 - 1])
