"""kabpfd, as `python3 -m kabpf.daemon`."""

import sys

from kabpf.daemon.main import main

sys.exit(main())
