"""A server that knows nothing of keepalive: answers each line with the line in capitals.

server.py ADDRESS PORT
"""

import socketserver
import sys


class Answer(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line.upper())


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True


with Server((sys.argv[1], int(sys.argv[2])), Answer) as server:
    print("       server: listens", flush=True)
    server.serve_forever()
