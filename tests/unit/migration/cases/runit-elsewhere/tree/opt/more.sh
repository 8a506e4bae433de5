#!/bin/sh
exec s6-svscan /opt/more
