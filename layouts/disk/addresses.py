"""What a text is that was meant as the path of a checkpoint, and is an address, a pattern or a path of somebody else's. Pure.

In: a text. Out: a sentence that says what to give in its place. It never looks at a disk, a store or the network.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

from layouts.disk.buckets import DRIVERS

_STORES = " and ".join(f"{scheme}://" for scheme in DRIVERS)
_S3 = "a store that speaks S3 is s3://BUCKET/PATH, and its address is AWS_ENDPOINT_URL"
_ELSEWHERE = "this is on another machine; mount it, or copy it here"
_SCHEMES: Mapping[str, str] = {
    "file": "give the path alone, without file://",
    "gcs": "Google's store is gs://BUCKET/PATH",
    **dict.fromkeys(("http", "https", "ftp", "hf"), "nothing is fetched from there; download it, and give the directory"),
    **dict.fromkeys(("ssh", "scp", "sftp", "rsync"), _ELSEWHERE),
    **dict.fromkeys(("s3a", "s3n"), "Amazon's store is s3://BUCKET/PATH"),
    **dict.fromkeys(("r2", "minio", "b2", "oss", "cos"), _S3),
}
"""Schemes of addresses that are none here -> what to do."""
_BEGIN: Sequence[tuple[str, str]] = (
    (r"~", "~ stands for your home only without quotes"),
    *((rf"(?i:{scheme}):/", f"an address begins with {scheme}://") for scheme in DRIVERS),
    (r"[A-Za-z]:[\\/]|\\\\", r"this is a path of Windows; in WSL, C:\ is /mnt/c/"),
    (r"[\w.@-]+:/|[\w.-]+@[\w.-]+:", _ELSEWHERE),
    (r"-$", "a checkpoint is a directory; - is none"),
)
"""How paths begin that were meant otherwise -> what to do."""
_PARTS: Sequence[tuple[str, str]] = (
    (r".*\$\w|.*\$\{", "$ stands for a variable only without single quotes"),
    (r".*[*?]", "nothing has a name of this pattern"),
    (r"(['\"]).*\1$|[\u201c\u2018\xab].*[\u201d\u2019\xbb]$", "its quotes belong to the name; leave them out"),
    (r"\s|.*\s$", "its name begins or ends with a space"),
    (r".*[\ufeff\u200b-\u200f\u202a-\u202e\u2060]", "it holds a letter that is not seen; type it anew"),
    (r"/?path/to/|<.*>$", "this stands for a path of yours; put that in its place"),
    (r".*\\", r"\ separates no folders here; write /"),
)
"""Parts of paths that were meant otherwise -> what to do. What is there under such a name is taken as it is."""
_TAGGED = r".*:(?:latest|[\w.-]*\d+[bB][\w.-]*|I?Q\d\w*|B?F16)$"
"""What Ollama and llama.cpp call models: a name and a tag."""
_HOST = r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|(?:huggingface|hf)\.co/|hf://|git@(?:huggingface|hf)\.co:"
_MODEL = r"([^/@]+/[^/@]+)(?:@([^/]+)|/(?:tree|blob|resolve)/([^/]+))?(/.*)?$"
"""A page or an address of the hub: the host, then the model, a revision, and what lies in it."""
_HUB = frozenset(string.ascii_letters + string.digits + "._-")
_NO_MODELS = ("datasets", "spaces")
"""What the hub has besides models, in the place of an owner."""
_FILES = (".safetensors", ".json", ".gguf", ".bin", ".txt", ".md")


def foreign(address: str) -> str:
    """What to do about an address that no store here has."""
    scheme = address.partition("://")[0]
    if scheme.lower() in DRIVERS:
        return f"an address begins with {scheme.lower()}://"
    return _SCHEMES.get(scheme.lower(), f"the stores that are known are {_STORES}; copy it there, or to a disk")


def otherwise(path: str, *, whole: bool = True) -> str | None:
    """What to do about a path of which nothing is there, if it looks as if it was meant otherwise; `whole` if it is no rest."""
    tables = ((_BEGIN, [path] if whole else []), (_PARTS, [path, *path.split("/")]))
    found = (words for table, texts in tables for pattern, words in table for text in texts if re.match(pattern, text))
    return next(found, None)


def of_others(path: str) -> str | None:
    """What to do about the name that another program has for a model."""
    return "this is a model of Ollama or llama.cpp (GGUF); take its safetensors" if re.match(_TAGGED, path) else None


def of_the_hub(address: str) -> str | None:
    """How to download the model whose page, id or address in the words of other tools this is; None if it is none."""
    begin = re.match(_HOST, address)
    found = re.match(_MODEL, address[begin.end() if begin else 0 :])
    if found is None or not is_hub_id(found[1]) or (found[4] and not (begin or found[3])):
        return None
    revision = found[2] or (found[3] if found[3] != "main" else None)
    return f"hf download {found[1]}{f' --revision {revision}' if revision else ''} --local-dir {found[1].rpartition('/')[2]}"


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a model's id: OWNER/NAME."""
    owner, _, name = text.partition("/")
    form = bool(owner and name) and set(owner + name) <= _HUB and owner[0] != "." and name[0] != "."
    return form and owner not in _NO_MODELS and not is_file_name(name)


def is_file_name(name: str) -> bool:
    """Whether nobody calls a directory so, but a file of a checkpoint."""
    return name.lower().endswith(_FILES)
