"""Device files and whether a user may open them, by owner, group and mode.

ROCm opens /dev/kfd and the card's /dev/dri/renderD*, NVIDIA's driver /dev/nvidia*. The files of
this machine are also tried, for an access list may allow what the mode does not (a desktop's login
does that).
"""

import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

PATTERNS = ("dev/kfd", "dev/dxg", "dev/dri/renderD*", "dev/nvidia[0-9]*", "dev/nvidiactl")


@dataclass(frozen=True)
class User:
    """Who asks. gids: of the process, its own group included."""

    name: str
    uid: int
    gids: tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """A device file; `usable`: the user may read and write it."""

    path: str  # "/dev/kfd"
    mode: int  # permission bits
    uid: int
    gid: int
    group: str
    usable: bool


def this_user() -> User:
    uid = os.getuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:  # a container may run under a number that has no name
        name = str(uid)
    return User(name, uid, tuple(sorted({os.getgid(), *os.getgroups()})))


def device_nodes(root: Path, user: User) -> tuple[Node, ...]:
    paths = [p for pattern in PATTERNS for p in sorted(root.glob(pattern))]
    names = {gid: name for name, (gid, _) in _groups(root).items()}
    return tuple(_node(path, root, user, names) for path in paths)


def groups_named(root: Path, user: str) -> tuple[str, ...]:
    """The groups that /etc/group lists the user in."""
    return tuple(name for name, (_, members) in _groups(root).items() if user in members)


def may_open(mode: int, uid: int, gid: int, user: User) -> bool:
    """Whether a file of that owner and mode can be read and written by the user."""
    if user.uid == 0:
        return True
    if user.uid == uid:
        wanted = stat.S_IRUSR | stat.S_IWUSR
    elif gid in user.gids:
        wanted = stat.S_IRGRP | stat.S_IWGRP
    else:
        wanted = stat.S_IROTH | stat.S_IWOTH
    return mode & wanted == wanted


def _node(path: Path, root: Path, user: User, names: dict[int, str]) -> Node:
    found = path.stat()
    usable = may_open(found.st_mode, found.st_uid, found.st_gid, user)
    if root == Path("/") and user.uid == os.getuid():
        usable = usable or os.access(path, os.R_OK | os.W_OK)
    group = names.get(found.st_gid, str(found.st_gid))
    where = f"/{path.relative_to(root)}"
    mode = stat.S_IMODE(found.st_mode)
    return Node(where, mode, found.st_uid, found.st_gid, group, usable)


def _groups(root: Path) -> dict[str, tuple[int, tuple[str, ...]]]:
    """/etc/group: name -> (number, members)."""
    try:
        lines = (root / "etc/group").read_text().splitlines()
    except OSError:
        return {}
    rows = [line.split(":") for line in lines]
    return {
        row[0]: (int(row[2]), tuple(row[3].split(",")))
        for row in rows
        if len(row) == 4 and row[2].isdigit()
    }
