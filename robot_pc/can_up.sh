#!/bin/sh
# Brings CAN interfaces up as a Piper needs them: can_up.sh NAME...
#
# 1 Mbit/s; after a bus-off the controller comes back by itself within 100 ms. Run as root; run it as often as you
# like: an interface that is up as it should be is left alone, for setting it again would take it down under the arm.
# The transmit queue keeps the kernel's 10 frames on purpose: a longer one would send old setpoints after a pause.
set -eu

BITRATE=1000000
RESTART_MS=100
CAN_TYPE=280 # ARPHRD_CAN of linux/if_arp.h
NET=${SIMPLEVLA_NET:-/sys/class/net}

fail() {
    echo "can_up: $1; $2" >&2
    exit 1
}

is_as_wanted() {
    ip -details link show dev "$1" | tr '\n' ' ' |
        grep -Eq "[<,]UP[,>].*restart-ms $RESTART_MS .*bitrate $BITRATE "
}

[ $# -gt 0 ] || fail "no interface is named" "give one, such as can_left"
for name in "$@"; do
    case $name in
    '' | *[!A-Za-z0-9_]* | ????????????????*) fail "'$name' is no interface's name" "use up to 15 letters, digits and _" ;;
    esac
    [ -d "$NET/$name" ] || fail "there is no interface $name" "plug its adapter in; install.sh without arguments lists those there are"
    [ "$(cat "$NET/$name/type")" = "$CAN_TYPE" ] || fail "$name is no CAN interface" "install.sh without arguments lists those there are"
done
for name in "$@"; do
    if is_as_wanted "$name"; then
        echo "$name: is up already"
        continue
    fi
    ip link set dev "$name" down
    ip link set dev "$name" type can bitrate "$BITRATE" restart-ms "$RESTART_MS"
    ip link set dev "$name" up
    is_as_wanted "$name" || fail "$name did not come up at $BITRATE bit/s" "see: ip -details link show dev $name"
    echo "$name: up at $BITRATE bit/s"
done
