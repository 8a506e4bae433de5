#!/bin/sh
LD_PRELOAD=/usr/lib/libdontdie.so /usr/bin/sync-them
