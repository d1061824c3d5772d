#!/bin/sh
# Stands in for `quorate`: prints its arguments, then waits to be stopped.
echo "$@"
case "$*" in *--exit-with*) exit 3 ;; esac
trap 'exit 0' TERM
while :; do sleep 0.05; done
