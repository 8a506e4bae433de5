#!/bin/bash
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null 2>&1 && pwd)
source "$HERE/here.env"
exec /usr/bin/app
