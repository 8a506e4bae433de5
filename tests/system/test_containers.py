"""Containers as podman starts them, and the same layout of cgroups where that can't run."""

import json
import subprocess

import pytest
from machine import COVERED, KEEPALIVE, PROGRAMS_INSIDE
