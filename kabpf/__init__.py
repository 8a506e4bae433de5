"""kabpf: TCP keepalive by policy, for every socket of the cgroups that a policy selects."""

__version__ = "0.1.0"
