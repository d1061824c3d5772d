#!/bin/sh
# Stands in for `quorate`: prints its arguments, then waits to be stopped.
trap 'exit 0' TERM
echo "$@"
case "$*" in *--exit-with*) exit 3 ;; esac
while :; do sleep 0.05; done
