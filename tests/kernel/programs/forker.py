"""Runs kabpfctl in forks of itself, as told on standard input, a socket of whole messages: a list
of environment, directory and arguments, with descriptors for output and errors; answers with the
status."""

import gc
import json
import os
import pkgutil
import socket
import sys
from importlib import import_module

import yaml  # noqa: F401

from kabpf import cli, commands, faults, output  # noqa: F401

# What a command imports when it is called takes longer than most commands.
for module in pkgutil.iter_modules(commands.__path__, "kabpf.commands."):
    import_module(module.name)

# The collector would write to, and so copy, each page of what is shared with the forks.
gc.collect()
gc.freeze()
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
        try:
            status = cli.main()
        except SystemExit as wrong_usage:
            status = wrong_usage.code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # to take the interpreter apart copies most of its memory
    for descriptor in descriptors:
        os.close(descriptor)
    _, status = os.waitpid(child, 0)
    channel.send(b"%d" % os.waitstatus_to_exitcode(status))
