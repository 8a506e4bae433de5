#!/bin/bash
. ${0%/*}/cut.env
exec /usr/bin/app "${0##*/}"
