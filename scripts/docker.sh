#!/bin/sh
# Run a command with a Docker engine at hand:  scripts/docker.sh COMMAND...
#
# Uses the engine that DOCKER_HOST or the default socket reaches. If none answers, then on Debian and Ubuntu, as root,
# installs one, starts it, and stops it when the command has ended. The exit code is the command's.

dev=$(dirname "$0")/../.dev
python=$dev/../.venv/bin/python
dockerd=

answers() { "$python" -c 'import docker; docker.from_env(timeout=10).ping()' 2>/dev/null; }

fail() { echo "$*" >&2; exit 1; }

stop() {
  if [ -n "$dockerd" ]; then kill "$dockerd" 2>/dev/null && wait "$dockerd"; fi
}

# After a kill -9 or a restart of the machine, dockerd takes what has its old pid, be it a zombie, for itself.
forget() {
  if pid=$(cat "$1" 2>/dev/null) && ! grep -qs "$2" "/proc/$pid/cmdline"; then rm -f "$1"; fi
}

start() {
  mkdir -p "$dev"
  forget /var/run/docker.pid dockerd
  forget /var/run/docker/containerd/containerd.pid containerd
  setsid dockerd > "$dev/dockerd.log" 2>&1 &  # its own session: Ctrl-C is for the command alone
  dockerd=$!
  for _ in $(seq 60); do
    answers && return
    kill -0 "$dockerd" 2>/dev/null || break
    sleep 0.5
  done
  tail -n 20 "$dev/dockerd.log" >&2
  fail "dockerd did not start; its log is in .dev/dockerd.log."
}

trap 'stop' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

if ! answers; then
  [ -z "$DOCKER_HOST" ] || fail "No Docker engine answers at DOCKER_HOST=$DOCKER_HOST: start it, or unset DOCKER_HOST."
  if [ "$(id -u)" != 0 ] || ! grep -qsE '^ID(_LIKE)?=.*(debian|ubuntu)' /etc/os-release; then
    fail "No Docker engine answers: install Docker (https://docs.docker.com/engine/install/) or start it, and make sure" \
      "that you may use it (\`docker version\` shows a server)."
  fi
  if ! command -v dockerd > /dev/null; then
    # The command line is a package of its own in newer releases.
    apt-get update -qq && cli=$(apt-cache search --names-only '^docker-cli$' | cut -d ' ' -f 1) \
      && apt-get install -y -qq --no-install-recommends docker.io $cli iptables >&2 \
      || fail "docker.io could not be installed; the lines above say why."
  fi
  answers || start
fi

"$@"
