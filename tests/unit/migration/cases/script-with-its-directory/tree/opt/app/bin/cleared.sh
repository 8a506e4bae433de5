#!/bin/bash
export LD_PRELOAD=/usr/lib/libdontdie.so
exec -c /usr/bin/app
