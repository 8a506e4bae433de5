"""A client that knows nothing of keepalive: asks, is silent, and asks again over one connection.

client.py ADDRESS PORT SILENCE_S PATIENCE_S

Exit status 0 where both questions were answered, 1 where the second was not, 2 for anything else.
"""

import socket
import sys
import time

address, port, silence_s, patience_s = sys.argv[1], *map(int, sys.argv[2:])
start = time.monotonic()


def say(what: str) -> None:
    print(f"{time.monotonic() - start:5.1f} s  client: {what}", flush=True)


def ask(connection: socket.socket, question: str) -> None:
    say(f"asks {question!r}")
    connection.sendall(f"{question}\n".encode())
    answer = connection.recv(100)
    if not answer:
        raise ConnectionError("closed by the server")
    say(f"is answered {answer.decode().strip()!r}")


def talk(connection: socket.socket) -> int:
    say("is connected")
    ask(connection, "first question")
    say(f"is silent for {silence_s} s")
    time.sleep(silence_s)
    try:
        ask(connection, "second question")
    except TimeoutError:
        say(f"no answer in {patience_s} s, gives up (TCP itself would try for 15 minutes)")
        return 1
    return 0


try:
    # The timeout is Python's own, made with poll(2): it sets no socket option.
    with socket.create_connection((address, port), patience_s) as opened:
        status = talk(opened)
except OSError as error:
    say(f"fails: {error}")
    status = 2
sys.exit(status)
