"""What a file is that spigan does not read, by its first bytes or its suffix: the error can then say what to do."""

from __future__ import annotations

_SIGNATURES = [
    (4, (b"ftypavif", b"ftypavis"), "AVIF"),
    (4, (b"ftyphei", b"ftyphev", b"ftypmif1", b"ftypmsf1"), "HEIC"),
    (0, (b"\xff\x0a", b"\0\0\0\x0cJXL "), "JPEG XL"),
    (0, (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"), "JPEG 2000"),
    (0, (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf", b"PF"), "PPM"),
    (0, (b"8BPS",), "Photoshop's PSD"),
    (0, (b"\0\0\1\0",), "an icon"),
    (0, (b"%PDF",), "PDF"),
    (0, (b"%!PS",), "PostScript"),
    (0, (b"<svg", b"<?xml"), "SVG or other XML"),
    (0, (b"PK\3\4",), "a zip file"),
]
_NOT_LOADED = [
    (b"version https://git-lfs", "a pointer of Git LFS", "run `git lfs pull`"),
    (b"<!doctype html", "a page in HTML", "download it again"),
    (b"<html", "a page in HTML", "download it again"),
]
UNPACK = {
    ".7z": "7z x",
    ".rar": "unrar x",
    ".gz": "gunzip -k",
    ".tgz": "gunzip -k -S .tgz",
    ".bz2": "bunzip2 -k",
    ".xz": "unxz -k",
    ".zst": "unzstd",
}
"""Commands that unpack archives which have no random access, by suffix."""


def kind_of(start: bytes) -> tuple[str, str]:
    """Return what a file is that Pillow cannot identify, and what to do about it, from its first bytes."""
    if not start:
        return "it is empty", "repair or remove it"
    for signature, kind, advice in _NOT_LOADED:
        if start.lower().startswith(signature):
            return f"it is {kind}", advice
    for offset, signatures, kind in _SIGNATURES:
        if start[offset:].startswith(signatures):
            return f"it is {kind}", "convert or remove it"
    if start.startswith((b"\x89PNG", b"\xff\xd8", b"RIFF", b"GIF8", b"BM", b"II*", b"MM\0*")):
        return "it is damaged", "repair or remove it"
    return "its contents are of no known format", "repair or remove it"
