#!/bin/sh
# Prepares a host without Kubernetes: user, directories and the unit of one role. As root:
#   set-up.sh engine|worker|frontend
# Remuda itself belongs to /opt/remuda (deploy/docker/install.sh makes such an environment on any host). DESTDIR puts
# everything below another root, to look at it first.
set -eu

role=${1:-}
root=${DESTDIR:-}
here=$(cd "$(dirname "$0")" && pwd)
case $role in
engine | worker | frontend) ;;
*)
  echo "usage: set-up.sh engine|worker|frontend" >&2
  exit 2
  ;;
esac

if [ -z "$root" ] && ! id remuda >/dev/null 2>&1; then
  useradd --system --home-dir /var/lib/remuda --shell /usr/sbin/nologin remuda
fi
install -d -m 0755 "$root/etc/remuda" "$root/etc/systemd/system"
install -m 0644 "$here/remuda-$role.service" "$root/etc/systemd/system/"

# What is there stays: it is the host's own.
keep() {
  [ -e "$root/etc/remuda/$1" ] || install -m "$2" "$here/$1" "$root/etc/remuda/$1"
}
keep host.env 0644
case $role in
engine) keep engine.yaml 0644 ;;
frontend)
  keep security.yaml 0644
  # The front end reads keys again when they change, as the user that it runs as.
  install -d -m 0700 "$root/etc/remuda/keys"
  [ -n "$root" ] || chown remuda:remuda /etc/remuda/keys
  echo "make a key: runuser -u remuda -- /opt/remuda/bin/remuda keys create --file /etc/remuda/keys/keys --tenant NAME"
  ;;
esac
if [ ! -e "$root/etc/remuda/secret" ]; then
  (umask 077 && head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$root/etc/remuda/secret")
  echo "made /etc/remuda/secret: copy the engine's to every host of the cluster, front ends included"
fi
echo "edit /etc/remuda, then: systemctl daemon-reload && systemctl enable --now remuda-$role"
