#!/bin/bash
cd `dirname $0`
. ./cd.env
exec /usr/bin/app
