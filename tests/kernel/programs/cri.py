"""A client of containerd's CRI in place of kubelet: starts a pod with one container, and prints
what that prints first. Arguments: NAME OF THE POD, CONTAINER'S COMMAND..."""

import contextlib
import os
import sys
import time
import uuid

import grpc

SOCKET = "unix:///run/containerd/containerd.sock"
NAMESPACE = "shop"
IMAGE = "registry.example/first:1"
NODE = 2  # NamespaceMode: the host's network, so that no CNI is needed


def varint(number):
    done = b""
    while number > 127:
        done += bytes([number & 127 | 128])
        number >>= 7
    return done + bytes([number])


def field(number, value):
    """A field of a protobuf message: a number, a string, a message, or a map of strings."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, dict):
        pairs = (field(1, key) + field(2, each) for key, each in value.items())
        return b"".join(field(number, pair) for pair in pairs)
    raw = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def call(method, *fields):
    """Call a method of RuntimeService (api.proto of k8s.io/cri-api); its answer's first string."""
    with grpc.insecure_channel(SOCKET) as channel:
        answer = channel.unary_unary(f"/runtime.v1.RuntimeService/{method}")(
            b"".join(fields), timeout=60
        )
    return answer[2 : 2 + answer[1]].decode() if answer else ""


def start(name, command):
    """Start a pod as kubelet would, with its labels and cgroups; returns its id and its log."""
    uid = str(uuid.uuid4())
    own = {
        "io.kubernetes.pod.name": name,
        "io.kubernetes.pod.namespace": NAMESPACE,
        "io.kubernetes.pod.uid": uid,
    }
    log = f"/run/pods/{uid}"
    os.makedirs(log)
    parent = f"kubepods-besteffort-pod{uid.replace('-', '_')}.slice"
    options = field(1, field(1, NODE))  # LinuxSandboxSecurityContext: namespace_options
    pod = (
        field(1, field(1, name) + field(2, uid) + field(3, NAMESPACE))
        + field(3, log)
        + field(6, {"app": "web"} | own)
        + field(7, {"io.kabpf.policy": "offered"})
        + field(8, field(1, parent) + field(2, options))
    )
    container = (
        field(1, field(1, "main"))
        + field(2, field(1, IMAGE))
        + b"".join(field(3, word) for word in command)
        + field(9, {"io.kubernetes.container.name": "main"} | own)
        + field(10, {"io.kubernetes.container.hash": "9a1"})
        + field(11, "log")
        + field(15, field(2, field(3, field(1, NODE))))
    )
    sandbox = call("RunPodSandbox", field(1, pod))
    made = call("CreateContainer", field(1, sandbox), field(2, container), field(3, pod))
    call("StartContainer", field(1, made))
    return sandbox, f"{log}/log"


def first_line(log):
    """What the container printed: the log has time, stream and a tag before it."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError), open(log) as lines:
            if (line := lines.readline()).endswith("\n"):
                return line.rstrip().split(" ", 3)[3]
        time.sleep(0.01)
    raise TimeoutError(log)


def stop(sandbox):
    """As kubelet does, again where a container that ends by itself just then makes it fail
    ("ttrpc: closed")."""
    for attempt in range(5):
        try:
            call("StopPodSandbox", field(1, sandbox))
            break
        except grpc.RpcError:
            if attempt == 4:
                raise
    call("RemovePodSandbox", field(1, sandbox))


if __name__ == "__main__":
    name, *command = sys.argv[1:]
    sandbox, log = start(name, command)
    print(first_line(log))
    if len(command) == 1:
        stop(sandbox)
