#!/bin/bash
# the exporter first
/usr/bin/exporter --config=/etc/exporter.yaml &
LD_PRELOAD=/opt/planner/lib/libkeepalive.so KEEPIDLE=120 KEEPINTVL=20 KEEPCNT=5 /usr/bin/planner
wait -n
exit $?
