"""A process that holds the lock of one of its TCP sockets: it sends from memory that nobody fills
(userfaultfd(2)). It says "held" on standard output, or what the kernel answers in place of such
memory, and holds it until a line comes on standard input; then it lets go, and answers every line
with the socket's idle time. It ends with standard input. When it is killed the kernel lets go of
the socket. With an argument it is the user of that number by then: one without rights does the same
with FUSE."""

import ctypes
import fcntl
import mmap
import os
import socket
import struct
import sys
import threading
import time

USERFAULTFD = {"x86_64": 323, "aarch64": 282}
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_ZEROPAGE = 0xC018AA3F, 0xC020AA00, 0xC020AA04
API, MISSING = 0xAA, 1
DEADLINE_S = 60

libc = ctypes.CDLL(None, use_errno=True)


def unfilled():
    """The address of a page whose first reader waits for ever."""
    descriptor = libc.syscall(USERFAULTFD[os.uname().machine], os.O_CLOEXEC)
    if descriptor < 0:
        print(f"userfaultfd: {os.strerror(ctypes.get_errno())}")
        sys.exit(1)
    fcntl.ioctl(descriptor, UFFDIO_API, bytearray(struct.pack("QQQ", API, 0, 0)))
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    register = struct.pack("QQQQ", address, mmap.PAGESIZE, MISSING, 0)
    fcntl.ioctl(descriptor, UFFDIO_REGISTER, bytearray(register))
    return descriptor, page, address


def begin_to_send(connection, address):
    """Return when the sending thread sleeps in the fault."""
    arguments = connection.fileno(), ctypes.c_void_p(address), 100, 0
    thread = threading.Thread(target=libc.send, args=arguments, daemon=True)
    thread.start()
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        with open(f"/proc/self/task/{thread.native_id}/wchan", "rb") as place:
            if b"userfault" in place.read():
                return
        time.sleep(0.001)
    sys.exit("the sending thread does not sleep in the fault")


descriptor, page, address = unfilled()
for user in map(int, sys.argv[1:]):
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
listener = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listener.getsockname())
begin_to_send(client, address)
print("held", flush=True)
for number, _ in enumerate(sys.stdin):
    if not number:
        filled = struct.pack("QQQQ", address, mmap.PAGESIZE, 0, 0)
        fcntl.ioctl(descriptor, UFFDIO_ZEROPAGE, bytearray(filled))
    print(client.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), flush=True)
# Not by the interpreter's end, which would close the socket and wait for its own thread.
os.kill(os.getpid(), 9)
