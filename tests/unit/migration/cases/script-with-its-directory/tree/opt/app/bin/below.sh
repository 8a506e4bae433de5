. "$(dirname "$0")/below.env"
exec /usr/bin/app
