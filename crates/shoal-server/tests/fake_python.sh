#!/bin/sh
# An interpreter as far as a test of templates needs: it runs what $SCRIPT says, whatever its arguments are.
eval "$SCRIPT"
