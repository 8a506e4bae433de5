"""The life of kabpf.service: start, reload, stop, restart, crash."""


def test_starts_at_boot(machine):
    """kabpf is active after a boot, and says what is in force."""
    assert machine.show("kabpf.service", "ActiveState") == "active"
    assert machine.show("kabpf.service", "StatusText").startswith("policies in force: 0")
