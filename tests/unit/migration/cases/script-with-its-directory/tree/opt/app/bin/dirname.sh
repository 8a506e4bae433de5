#!/bin/bash
. "$(dirname "$0")/dirname.env"
exec /usr/bin/app
