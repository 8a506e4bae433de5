"""A process with sockets that does as it is told: a JSON list [function, argument...] a line on
standard input, a JSON answer a line on standard output. It knows nothing of kabpf."""

import ctypes
import errno
import json
import os
import resource
import select
import socket
import sys
import time

SOCKETS = []
OPTIONS = {
    "keepalive": (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    "idle": (socket.SOL_TCP, socket.TCP_KEEPIDLE),
    "interval": (socket.SOL_TCP, socket.TCP_KEEPINTVL),
    "probes": (socket.SOL_TCP, socket.TCP_KEEPCNT),
    "user_timeout": (socket.SOL_TCP, socket.TCP_USER_TIMEOUT),
}


def open_socket(family, kind=socket.SOCK_STREAM, protocol=0):
    SOCKETS.append(socket.socket(family, kind, protocol))
    return len(SOCKETS) - 1


def listen(number, address, backlog=128):
    SOCKETS[number].bind(tuple(address))
    SOCKETS[number].listen(backlog)
    return SOCKETS[number].getsockname()[:2]


def listen_unbound(number):
    """Listen on a port that the kernel chooses in listen(); the port."""
    SOCKETS[number].listen()
    return SOCKETS[number].getsockname()[1]


def bind(number, address):
    SOCKETS[number].bind(tuple(address))


def connect(number, address):
    try:
        SOCKETS[number].connect(tuple(address))
    except BlockingIOError:
        SOCKETS[number].setblocking(True)
        error = SOCKETS[number].connect_ex(tuple(address))
        assert error in (0, 106), os.strerror(error)


def connect_error(number, address):
    """The errno's name, or ""."""
    error = SOCKETS[number].connect_ex(tuple(address))
    return errno.errorcode[error] if error else ""


def begin_to_connect(number, address):
    SOCKETS[number].setblocking(False)
    SOCKETS[number].connect_ex(tuple(address))


def connect_with_data(number, address):
    SOCKETS[number].sendto(b"early", socket.MSG_FASTOPEN, tuple(address))


def accept(number):
    SOCKETS[number].setblocking(True)
    SOCKETS.append(SOCKETS[number].accept()[0])
    return len(SOCKETS) - 1


def options(number):
    return {name: SOCKETS[number].getsockopt(*where) for name, where in OPTIONS.items()}


def option(number, name):
    return SOCKETS[number].getsockopt(*OPTIONS[name])


def keepalive(number):
    return SOCKETS[number].getsockopt(*OPTIONS["keepalive"])


def set_option(number, name, value):
    SOCKETS[number].setsockopt(*OPTIONS[name], value)


def set_often(number, name, value, count):
    for _ in range(count):
        SOCKETS[number].setsockopt(*OPTIONS[name], value)


def set_bytes(number, level, name, value):
    """Set any option to bytes, given in hexadecimal; the errno's name, or ""."""
    try:
        SOCKETS[number].setsockopt(level, name, bytes.fromhex(value))
    except OSError as error:
        return errno.errorcode[error.errno]
    return ""


def get_bytes(number, level, name, size):
    return SOCKETS[number].getsockopt(level, name, size).hex()


def local_port(number):
    return SOCKETS[number].getsockname()[1]


def remote_port(number):
    return SOCKETS[number].getpeername()[1]


def restore(number, own, address):
    """Make it a connection between these addresses, as CRIU does after a move (TCP_REPAIR)."""
    one, repair, queue, queue_seq = SOCKETS[number], 19, 20, 21
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.setsockopt(socket.SOL_TCP, repair, 1)
    for which in (1, 2):  # received, sent
        one.setsockopt(socket.SOL_TCP, queue, which)
        one.setsockopt(socket.SOL_TCP, queue_seq, 1000)
    one.bind(tuple(own))
    one.connect(tuple(address))
    one.setsockopt(socket.SOL_TCP, repair, -1)  # without a probe of the window


def shut(number):
    SOCKETS[number].shutdown(socket.SHUT_WR)


def send(number, text="data", flags=0):
    SOCKETS[number].send(text.encode(), flags)


def send_all_that_fits(number):
    """Until the other side's buffer is full, and so is ours; how many bytes."""
    sent = 0
    SOCKETS[number].setblocking(False)
    try:
        while True:
            sent += SOCKETS[number].send(bytes(65536))
    except BlockingIOError:
        SOCKETS[number].setblocking(True)
    return sent


def close(number):
    SOCKETS[number].close()


def connection_in(namespace, address):
    """A socket connected in another network namespace, by a process that is back in its own."""
    libc = ctypes.CDLL(None)
    with open("/proc/self/ns/net") as own, open(namespace) as other:
        assert libc.setns(other.fileno(), 0) == 0
        number = open_socket(socket.AF_INET)
        connect(number, address)
        assert libc.setns(own.fileno(), 0) == 0
    return number


def listener_in_new_namespace():
    """A listener in a network namespace that nothing else keeps."""
    libc = ctypes.CDLL(None)
    with open("/proc/self/ns/net") as own:
        assert libc.unshare(0x40000000) == 0  # CLONE_NEWNET
        number = open_socket(socket.AF_INET)
        listen(number, ["", 0])
        assert libc.setns(own.fileno(), 0) == 0
    return number


def in_child(address):
    """The options of a connection that a forked child opens."""
    end, child_end = os.pipe()
    if os.fork() == 0:
        number = open_socket(socket.AF_INET)
        connect(number, address)
        os.write(child_end, json.dumps(options(number)).encode())
        os._exit(0)
    os.wait()
    return json.loads(os.read(end, 4096))


def allow_many():
    """Sockets without a bound below root's: a container may begin with 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def connect_many(address, count):
    allow_many()
    for _ in range(count):
        connect(open_socket(socket.AF_INET), address)


def accept_many(number, count):
    allow_many()
    for _ in range(count):
        accept(number)


def all_options(first):
    """How often which options, over the sockets from `first` on."""
    seen = {}
    for number in range(first, len(SOCKETS)):
        key = json.dumps(options(number), sort_keys=True)
        seen[key] = seen.get(key, 0) + 1
    return seen


def connect_while(address, path):
    """Connect again and again until `path` is gone; how often which options at once."""
    seen = {}
    while os.path.exists(path):
        with socket.create_connection(tuple(address)) as connection:
            SOCKETS.append(connection)
            key = json.dumps(options(len(SOCKETS) - 1), sort_keys=True)
            SOCKETS.pop()
        seen[key] = seen.get(key, 0) + 1
    return seen


def accept_while(number, path):
    """Accept again and again until `path` is gone; how often which options at once."""
    seen = {}
    SOCKETS[number].settimeout(0.1)
    while os.path.exists(path):
        try:
            connection = SOCKETS[number].accept()[0]
        except TimeoutError:
            continue
        with connection:
            SOCKETS.append(connection)
            key = json.dumps(options(len(SOCKETS) - 1), sort_keys=True)
            SOCKETS.pop()
        seen[key] = seen.get(key, 0) + 1
    return seen


def received(numbers, seconds):
    """How many bytes come on each of these sockets until all are silent for so long."""
    counts, open_ones = dict.fromkeys(numbers, 0), {SOCKETS[number]: number for number in numbers}
    for one in open_ones:
        one.setblocking(False)
    while ready := select.select([*open_ones], [], [], seconds)[0]:
        for one in ready:
            try:
                came = len(one.recv(1 << 20))
            except OSError:
                came = 0
            counts[open_ones[one]] += came
            if not came:
                del open_ones[one]
    return [*counts.values()]


def wait_for_keepalive(number, seconds):
    """How long it takes, in seconds, until SO_KEEPALIVE is on; None if it never is."""
    begin = time.monotonic()
    while time.monotonic() < begin + seconds:
        if keepalive(number):
            return time.monotonic() - begin
    return None


def receive(number, seconds):
    """What a read gives: "data", "end", an errno's name, or "waiting" after `seconds`."""
    SOCKETS[number].settimeout(seconds)
    try:
        return "data" if SOCKETS[number].recv(100) else "end"
    except TimeoutError as error:
        return "ETIMEDOUT" if error.errno else "waiting"


def main():
    for line in sys.stdin:
        function, *arguments = json.loads(line)
        print(json.dumps(globals()[function](*arguments)), flush=True)


if __name__ == "__main__":
    main()
