"""The system calls that a confined program has no business with, as a BPF filter (Linux, seccomp(2)).

Namespaces and limits do the confining. The filter closes what they leave open: sockets that belong to no network
namespace (vsock, netlink), memory outside every limit (System V and POSIX queues, memfd), notes left in keyrings,
changing another process's limits or priority, and parts of the kernel known for holes.
"""

from __future__ import annotations

import platform
import struct

from grape.errors import SandboxError

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE_NEW = 0x7E020080  # CLONE_NEW{TIME,NS,CGROUP,UTS,IPC,USER,PID,NET}
FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6: all that the empty network namespace confines

# call: (x86_64, aarch64)
DENIED = {
    "acct": (163, 89), "add_key": (248, 217), "bpf": (321, 280), "chroot": (161, 51), "fanotify_init": (300, 262),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fsopen": (430, 430), "fspick": (433, 433),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "io_uring_setup": (425, 425),
    "ioprio_set": (251, 30), "kcmp": (312, 272), "keyctl": (250, 219), "mbind": (237, 235),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "migrate_pages": (256, 238), "mount": (165, 40),
    "mount_setattr": (442, 442), "move_mount": (429, 429), "move_pages": (279, 239), "mq_open": (240, 180),
    "msgget": (68, 186), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "open_tree": (428, 428),
    "perf_event_open": (298, 241), "personality": (135, 92), "pidfd_getfd": (438, 438), "pivot_root": (155, 41),
    "process_madvise": (440, 440), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "ptrace": (101, 117), "quotactl": (179, 60), "request_key": (249, 218), "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "semget": (64, 190), "set_mempolicy": (238, 237), "setns": (308, 268), "setpriority": (141, 140),
    "shmat": (30, 196), "shmget": (29, 194), "swapoff": (168, 225), "swapon": (167, 224), "syslog": (103, 116),
    "umount2": (166, 39), "unshare": (272, 97), "userfaultfd": (323, 282),
}  # fmt: skip
CLONE, CLONE3, SOCKET, SOCKETPAIR, PRLIMIT = (56, 220), (435, 435), (41, 198), (53, 199), (302, 261)

LOAD, EQUAL, ANY_BIT, AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
NUMBER, ARCH, FIRST, FIRST_HIGH = 0, 4, 16, 20  # offsets in struct seccomp_data (little-endian)
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS = 1, 38


def program(machine: str | None = None) -> bytes:
    """The filter for this machine's architecture; SandboxError where its system calls are not listed here."""
    machine = machine or platform.machine()
    if machine not in AUDIT_ARCH:
        raise SandboxError(f"programs cannot be confined on {machine}: no system-call filter; name a sandbox service")
    column = list(AUDIT_ARCH).index(machine)
    refuse = [(RETURN, 0, 0, ERRNO | EPERM)]
    allow = [(RETURN, 0, 0, ALLOW)]
    steps = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, AUDIT_ARCH[machine]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    if machine == "x86_64":
        steps += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, ERRNO | ENOSYS)]  # the x32 numbers
    for numbers in DENIED.values():
        steps += [(EQUAL, 0, 1, numbers[column]), *refuse]
    steps += [(EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, ERRNO | ENOSYS)]  # its flags lie out of a filter's sight
    steps += [(EQUAL, 0, 4, CLONE[column]), (LOAD, 0, 0, FIRST), (ANY_BIT, 0, 1, CLONE_NEW), *refuse, *allow]
    for call in (SOCKET, SOCKETPAIR):
        known = [(EQUAL, len(FAMILIES) - place, 0, family) for place, family in enumerate(FAMILIES)]
        steps += [(EQUAL, 0, len(known) + 3, call[column]), (LOAD, 0, 0, FIRST), *known, *refuse, *allow]
    steps += [(EQUAL, 0, 4, PRLIMIT[column]), (LOAD, 0, 0, FIRST), (EQUAL, 1, 0, 0), *refuse, *allow]
    return b"".join(struct.pack("<HBBI", *step) for step in [*steps, *allow])
