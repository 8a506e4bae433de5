"""Where programs are started from beside systemd's units, and what a policy can do there."""

from __future__ import annotations

from dataclasses import dataclass

NOT_EVALUATED = (
    "in a way that is not evaluated, expected Environment=, EnvironmentFile=, or env in ExecStart="
)


@dataclass(frozen=True)
class Kind:
    """Files of one kind; a line in them that names a preload library is an error that says why."""

    what: str
    patterns: tuple[str, ...]
    why: str = NOT_EVALUATED


_SESSIONS = (
    "for what is started from a shell, which no policy selects; sessions are in {unit: user.slice}"
)
_CRON = "for jobs, which share the cgroup of their daemon: no policy selects one of them"
_UNUSED = "and no unit or script that was read uses it"

KINDS = (
    Kind("the dynamic loader", ("/etc/ld.so.preload",)),
    Kind(
        "environments of sessions",
        (
            "/etc/environment", "/etc/environment.d/*.conf", "/run/environment.d/*.conf",
            "/usr/local/lib/environment.d/*.conf", "/usr/lib/environment.d/*.conf",
            "/etc/security/pam_env.conf", "/etc/login.conf", "/etc/login.defs",
            "/root/.pam_environment", "/root/.ssh/environment",
            "/root/.config/environment.d/*.conf",
        ),
        "for sessions in a way that is not evaluated; sessions are in {unit: user.slice}",
    ),
    Kind(
        "start-up files of shells",
        (
            "/etc/profile", "/etc/profile.d/*", "/etc/bash.bashrc", "/etc/bashrc",
            "/etc/bash.bash_logout", "/etc/bash_completion.d/*", "/etc/zsh/*", "/etc/zshenv",
            "/etc/zshrc", "/etc/zprofile", "/etc/zlogin", "/etc/csh.*", "/etc/tcsh*",
            "/etc/ksh.kshrc", "/etc/mkshrc", "/etc/fish/config.fish", "/etc/fish/conf.d/*",
            "/etc/X11/Xsession.d/*", "/etc/X11/xinit/xinitrc.d/*", "/etc/skel/.*",
            "/root/.profile", "/root/.bash_profile", "/root/.bash_login", "/root/.bashrc",
            "/root/.bash_aliases", "/root/.bash_logout", "/root/.zshenv", "/root/.zprofile",
            "/root/.zshrc", "/root/.zlogin", "/root/.kshrc", "/root/.mkshrc", "/root/.cshrc",
            "/root/.tcshrc", "/root/.login", "/root/.xprofile", "/root/.xsession*",
            "/root/.config/fish/config.fish", "/root/.config/fish/conf.d/*", "/root/.bashrc.d/*",
            "/root/.profile.d/*", "/root/.env",
        ),
        _SESSIONS,
    ),
    Kind(
        "tables of cron and at",
        (
            "/etc/crontab", "/etc/anacrontab", "/etc/cron.*/*", "/etc/crontabs/*",
            "/etc/fcrontab", "/var/spool/cron/*", "/var/spool/cron/*/*", "/var/spool/fcron/*",
            "/var/spool/at/*", "/var/spool/at/*/*", "/var/cron/tabs/*", "/etc/incron.d/*",
            "/var/spool/incron/*",
        ),
        _CRON,
    ),
    Kind(
        "environments of init scripts",
        ("/etc/default/*", "/etc/sysconfig/*", "/etc/sysconfig/*/*", "/etc/conf.d/*"),
        _UNUSED,
    ),
    Kind(
        "scripts of init",
        (
            "/etc/init.d/*", "/etc/rc.d/init.d/*", "/etc/rc.local", "/etc/rc.d/rc.local",
            "/etc/rc.d/rc.*", "/etc/local.d/*", "/etc/rc.conf", "/etc/rc.boot/*", "/etc/boot.d/*",
            "/etc/inittab", "/etc/init/*.conf", "/etc/init.d/*/*", "/etc/dinit.d/*",
        ),
        "in a way that is not evaluated, expected a script that a unit starts",
    ),
    Kind(
        "supervisors",
        (
            "/etc/supervisord.conf", "/etc/supervisor/*.conf", "/etc/supervisor/*/*.conf",
            "/etc/supervisord.d/*", "/etc/supervisor.d/*", "/etc/xinetd.conf", "/etc/xinetd.d/*",
            "/etc/inetd.conf", "/etc/service/*/*", "/etc/service/*/env/*", "/etc/sv/*/*",
            "/etc/sv/*/env/*", "/service/*/*", "/service/*/env/*", "/var/service/*/*",
            "/var/service/*/env/*", "/etc/runit/*", "/etc/runit/runsvdir/*/*/*",
            "/etc/runit/runsvdir/*/*/env/*", "/etc/s6/*/*", "/etc/s6/*/*/*", "/etc/s6/*/*/env/*",
            "/etc/s6-overlay/*/*/*", "/etc/s6-rc/*/*", "/etc/s6-rc/*/*/*",
            "/etc/cont-init.d/*", "/etc/services.d/*/*", "/etc/monitrc",
            "/etc/monit/*", "/etc/monit/*/*", "/etc/monit.d/*", "/etc/circus/*", "/etc/god/*",
            "/etc/pm2/*", "/root/.pm2/dump.pm2", "/etc/procfile", "/etc/uwsgi/*/*",
        ),
        "for a job, which shares the cgroup of its supervisor: no policy selects it alone",
    ),
    Kind(
        "containers",
        (
            "/etc/containers/systemd/*", "/etc/containers/systemd/*/*",
            "/etc/containers/systemd/users/*/*", "/root/.config/containers/systemd/*",
            "/run/containers/systemd/*",
            "/usr/share/containers/systemd/*", "/etc/containers/*.conf",
            "/etc/containers/containers.conf.d/*", "/usr/share/containers/containers.conf",
            "/etc/systemd/nspawn/*", "/run/systemd/nspawn/*", "/var/lib/machines/*.nspawn",
            "/etc/docker/daemon.json", "/root/.docker/config.json",
            "/var/lib/docker/containers/*/config.v2.json", "/etc/kubernetes/manifests/*",
            "/var/lib/lxc/*/config", "/etc/lxc/*.conf", "/etc/pve/lxc/*.conf",
            "/etc/portables/*", "/opt/*/docker-compose.y*ml", "/opt/*/compose.y*ml",
            "/srv/*/docker-compose.y*ml", "/srv/*/compose.y*ml", "/root/docker-compose.y*ml",
            "/root/compose.y*ml", "/root/*/docker-compose.y*ml", "/root/*/compose.y*ml",
        ),
        "for a container; select the cgroup that its engine makes for it",
    ),
    Kind(
        "hooks and services of other programs",
        (
            "/etc/network/if-*.d/*", "/etc/network/interfaces", "/etc/network/interfaces.d/*",
            "/etc/NetworkManager/dispatcher.d/*", "/etc/NetworkManager/dispatcher.d/*/*",
            "/etc/networkd-dispatcher/*/*", "/etc/ppp/*", "/etc/ppp/ip-*.d/*", "/etc/dhcp/*.d/*",
            "/etc/udev/rules.d/*", "/etc/dbus-1/system.d/*", "/etc/dbus-1/system-services/*",
            "/usr/share/dbus-1/system-services/*", "/usr/local/share/dbus-1/system-services/*",
            "/usr/share/dbus-1/services/*", "/etc/xdg/autostart/*", "/root/.config/autostart/*",
            "/usr/local/share/applications/*", "/etc/acpi/*",
            "/etc/acpi/events/*", "/etc/logrotate.conf", "/etc/logrotate.d/*", "/etc/sudoers",
            "/etc/sudoers.d/*", "/etc/ssh/sshrc", "/etc/ssh/sshd_config", "/etc/ssh/*.d/*",
            "/etc/apache2/envvars", "/etc/httpd/conf/*", "/etc/httpd/conf.d/*",
            "/etc/php/*/fpm/*", "/etc/php/*/fpm/pool.d/*", "/etc/php-fpm.d/*", "/etc/tomcat*/*",
            "/etc/tomcat*/*/*", "/etc/postgresql/*/*/environment", "/etc/cloud/cloud.cfg.d/*",
            "/usr/lib/systemd/system-environment-generators/*",
            "/etc/systemd/system-environment-generators/*",
            "/usr/lib/systemd/user-environment-generators/*",
            "/etc/systemd/user-environment-generators/*", "/etc/systemd/*.conf",
            "/root/.config/systemd/user/*", "/root/.config/systemd/user/*.d/*",
            "/etc/systemd/system-generators/*", "/usr/lib/systemd/system-sleep/*",
            "/usr/lib/systemd/system-shutdown/*",
        ),
    ),
)  # fmt: skip
