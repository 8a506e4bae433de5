#!/bin/sh
/opt/app/inner.sh
