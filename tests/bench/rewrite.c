/* LD_PRELOAD puts this into Redis. It writes each fsync, fdatasync and rename of the main thread to the file TIMED: its
   name, when it began and ended (seconds since 1970), and for a rename the old name. strace would stop the process at
   each system call, which takes longer than a quick fsync. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static pid_t traced;
static int out = -1;

__attribute__((constructor)) static void begin(void) {
  traced = getpid();
  out = open(getenv("TIMED"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static double now(void) {
  struct timespec at;
  clock_gettime(CLOCK_REALTIME, &at);
  return at.tv_sec + at.tv_nsec / 1e9;
}

static int done(int result, const char *name, double began, const char *path) {
  if (gettid() == traced) dprintf(out, "%s %.6f %.6f %s\n", name, began, now(), path);
  return result;
}

int fsync(int file) {
  int (*call)(int) = dlsym(RTLD_NEXT, "fsync");
  double began = now();
  return done(call(file), "fsync", began, "");
}

int fdatasync(int file) {
  int (*call)(int) = dlsym(RTLD_NEXT, "fdatasync");
  double began = now();
  return done(call(file), "fdatasync", began, "");
}

int rename(const char *from, const char *to) {
  int (*call)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
  double began = now();
  return done(call(from, to), "rename", began, from);
}
