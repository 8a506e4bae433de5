"""Runs kabpfctl in forks of itself, as told on standard input, a socket of whole messages: a list
of environment, directory and arguments, with descriptors for output and errors; answers with the
status."""

import json
import os
import socket
import sys

from kabpf import cli, faults

channel = socket.socket(fileno=os.dup(0))
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
while True:
    message, descriptors, _, _ = socket.recv_fds(channel, 1 << 17, 2)
    if not message:
        break
    child = os.fork()
    if child == 0:
        environment, directory, *arguments = json.loads(message)
        for number, descriptor in enumerate(descriptors, 1):
            os.dup2(descriptor, number)
        os.closerange(3, max(descriptors) + 1)
        channel.detach()
        os.environ.clear()
        os.environ.update(environment)
        faults._fault = environment.get("KABPF_FAULT")
        os.chdir(directory)
        sys.argv = ["kabpfctl", *arguments]
        sys.exit(cli.main())
    for descriptor in descriptors:
        os.close(descriptor)
    _, status = os.waitpid(child, 0)
    channel.send(b"%d" % os.waitstatus_to_exitcode(status))
