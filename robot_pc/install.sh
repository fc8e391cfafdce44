#!/bin/bash
# Makes a PC a robot PC: names for CAN adapters and cameras' rights by udev, CAN at plug-in, bring-up by systemd.
#
#   sudo ./install.sh                                            lists the CAN adapters with their serial numbers
#   sudo ./install.sh can_left=SERIAL can_right=SERIAL           installs; run it again to change a name
#
# Nothing starts by itself until: systemctl enable --now simplevla. A robot.env that is there is kept. DESTDIR=DIR
# installs below DIR and tells no daemon.
set -euo pipefail

HERE=$(dirname "$(readlink -f "$0")")
NET=${SIMPLEVLA_NET:-/sys/class/net}
ROOT=${DESTDIR:-}
CAN_TYPE=280 # ARPHRD_CAN of linux/if_arp.h

main() {
    if (($# == 0)); then
        list_adapters
        return
    fi
    check_names "$@"
    install -D -m 0644 "$HERE/70-simplevla-cameras.rules" "$ROOT/etc/udev/rules.d/70-simplevla-cameras.rules"
    can_rules "$@" | install -D -m 0644 /dev/stdin "$ROOT/etc/udev/rules.d/70-simplevla-can.rules"
    install -D -m 0755 -t "$ROOT/usr/local/lib/simplevla" "$HERE/can_up.sh" "$HERE/bring_up.sh"
    install -D -m 0644 -t "$ROOT/etc/systemd/system" "$HERE/simplevla-can@.service" "$HERE/simplevla.service"
    [[ -e $ROOT/etc/simplevla/robot.env ]] || install -D -m 0644 -t "$ROOT/etc/simplevla" "$HERE/robot.env"
    if [[ -z $ROOT ]]; then
        udevadm control --reload
        udevadm trigger --action=add --subsystem-match=usb --attr-match=idVendor=8086
        systemctl daemon-reload
    fi
    echo "installed; unplug the CAN adapters and plug them in again, then look: ip -brief link show type can"
}

list_adapters() {
    local interface found=0
    for interface in "$NET"/*; do
        [[ $(cat "$interface/type" 2>/dev/null) == "$CAN_TYPE" ]] || continue
        found=1
        echo "$(basename "$interface") serial $(serial_of "$interface")"
    done
    ((found)) || echo "no CAN adapter is plugged in"
}

# The serial number of the USB device that an interface belongs to.
serial_of() {
    local folder
    folder=$(readlink -f "$1/device")
    while [[ $folder != / && ! -r $folder/serial ]]; do folder=$(dirname "$folder"); done
    if [[ $folder == / ]]; then echo "unknown"; else cat "$folder/serial"; fi
}

# What goes into a udev rule comes from outside: only what can end no string and no rule passes.
check_names() {
    local word names=() serials=()
    for word in "$@"; do
        [[ $word =~ ^([A-Za-z][A-Za-z0-9_]{0,14})=([A-Za-z0-9._:-]{1,64})$ ]] ||
            fail "'$word' is not NAME=SERIAL" "a name has up to 15 letters, digits and _, a serial number up to 64 and . : -"
        names+=("${BASH_REMATCH[1]}")
        serials+=("${BASH_REMATCH[2]}")
    done
    distinct "${names[@]}" || fail "a name is given twice" "give each adapter a name of its own"
    distinct "${serials[@]}" || fail "a serial number is given twice" "use one adapter for each arm"
}

distinct() { [[ -z $(printf '%s\n' "$@" | sort | uniq -d) ]]; }

can_rules() {
    local word
    echo "# Which CAN adapter is which arm's, by serial number; written by install.sh."
    for word in "$@"; do
        echo "SUBSYSTEM==\"net\", ACTION==\"add\", ATTR{type}==\"$CAN_TYPE\", ATTRS{serial}==\"${word#*=}\", NAME=\"${word%%=*}\"," \
            "TAG+=\"systemd\", ENV{SYSTEMD_WANTS}+=\"simplevla-can@${word%%=*}.service\""
    done
}

fail() {
    echo "install: $1; $2" >&2
    exit 1
}

main "$@"
