package main

import (
	"fmt"
	"path/filepath"
	"strings"
)

// unitTemplate is the systemd unit. %EXEC% is put in; everything else is fixed.
const unitTemplate = `# hotpatchd: security fixes inside running Windows programs.
# Written by "hotpatchd service install", which replaces it; for changes of your
# own use "systemctl edit hotpatchd".

[Unit]
Description=hotpatchd, security fixes inside running Windows programs
StartLimitIntervalSec=300
StartLimitBurst=10

[Service]
Type=notify
NotifyAccess=main
ExecStart=%EXEC%
ExecReload=kill -HUP $MAINPID
# A crash loses nothing: what is applied stays, and records and memory are
# brought together at the next start. A wrong configuration is not tried for ever.
Restart=on-failure
RestartSec=2s
TimeoutStartSec=3min
# Longer than the daemon's own bound, which prints where it hangs.
TimeoutStopSec=40s
WatchdogSec=2min
# A process stands still while its entries are changed: on a busy machine that
# moment must not wait for its turn behind others. Idle, the daemon takes next to nothing.
Nice=-10
# One descriptor for each process that is looked at, and some of its own.
LimitNOFILE=65536

StateDirectory=hotpatchd
StateDirectoryMode=0700
RuntimeDirectory=hotpatchd
RuntimeDirectoryMode=0755
ConfigurationDirectory=hotpatchd
UMask=0077

# What reaching into other users' processes needs, and nothing else:
#   CAP_SYS_PTRACE    attach to them, read /proc/PID/{mem,maps,exe,root} of theirs
#   CAP_DAC_OVERRIDE  open /proc/PID/mem for writing: it belongs to the process's
#                     user; read images in homes
#   CAP_NET_ADMIN     hear of process starts (NETLINK_CONNECTOR)
#   CAP_PERFMON       hear of executable memory that processes map (perf_event_open)
# Not CAP_KILL: threads are stopped by ptrace, nothing is ever signalled.
CapabilityBoundingSet=CAP_SYS_PTRACE CAP_DAC_OVERRIDE CAP_NET_ADMIN CAP_PERFMON
AmbientCapabilities=
NoNewPrivileges=yes

ProtectSystem=strict
# A metrics text file elsewhere needs its folder here (systemctl edit), and so do
# the folders whose files baselines replace; for files that are not root's,
# CAP_CHOWN in CapabilityBoundingSet, too.
# ReadWritePaths=/var/lib/prometheus/node-exporter /opt/acme
PrivateDevices=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
KeyringMode=private
# AF_NETLINK: process starts. AF_INET, AF_INET6: the repository.
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
SystemCallArchitectures=native
# @debug, kcmp and process_vm_*: that is what this daemon is for.
SystemCallFilter=@system-service @debug kcmp process_vm_readv process_vm_writev pidfd_open pidfd_send_signal
SystemCallErrorNumber=EPERM
# Never here: PrivatePIDs, PrivateUsers, ProtectProc, ProcSubset (they hide the
# processes), PrivateNetwork (it hides process starts), PrivateTmp and
# ProtectHome (images lie there too).

[Install]
WantedBy=multi-user.target
`

// unitText is the unit that starts exe with the configuration at config. Both
// must be absolute.
func unitText(exe, config string) (string, error) {
	for _, p := range []string{exe, config} {
		if !filepath.IsAbs(p) {
			return "", fmt.Errorf("cannot write a unit for %q: not an absolute path", p)
		}
		// {{ would be read by the template engine of kardianos/service.
		if strings.Contains(p, "{{") || strings.ContainsFunc(p, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			return "", fmt.Errorf("cannot write a unit for %q: the path holds a control character or {{", p)
		}
	}
	exec := unitWord(exe) + " run --config " + unitWord(config)
	return strings.Replace(unitTemplate, "%EXEC%", exec, 1), nil
}

// unitWord quotes a word of a command line in a unit: systemd.service(5),
// "Command lines", and systemd.unit(5), "Specifiers".
func unitWord(s string) string {
	s = strings.NewReplacer(`\`, `\\`, `"`, `\"`, `%`, `%%`, `$`, `$$`).Replace(s)
	return `"` + s + `"`
}
