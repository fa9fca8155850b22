/* Loaded by LD_PRELOAD: makes chosen calls of libc fail, halve or wait, below one folder only, and the clock jump.
 * A program arms it with faulty_arm() and asks with faulty_disarm() how often it struck. Built by faulty_training.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NO_ERROR = 0, SHORT = -1 };

static char calls[256], below[PATH_MAX];
static int error, first, times, delay_us;
static atomic_int armed, seen, struck;

/* calls_: names between spaces, " write fsync "; error_: errno, 0 for none, -1 for short writes. Strikes at the
 * matching calls first_, first_ + 1, ... times_ of them. */
void faulty_arm(const char *calls_, const char *below_, int error_, int first_, int times_, int delay_us_) {
  snprintf(calls, sizeof calls, "%s", calls_);
  snprintf(below, sizeof below, "%s", below_);
  error = error_, first = first_, times = times_, delay_us = delay_us_;
  seen = struck = 0;
  armed = 1;
}

int faulty_disarm(void) {
  armed = 0;
  return struck;
}

static int strikes(const char *call, const char *path) {
  if (!armed || !strstr(calls, call) || strncmp(path, below, strlen(below))) return 0;
  int number = ++seen;
  if (number < first || number - first >= times) return 0;
  struck++;
  if (delay_us) usleep(delay_us);
  errno = error;
  return error != NO_ERROR;
}

static const char *path_of(int descriptor, char *buffer) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, buffer, PATH_MAX - 1);
  buffer[length < 0 ? 0 : length] = 0;
  return buffer;
}

static const char *path_at(int folder, const char *path, char *buffer) {
  if (path[0] == '/' || folder == AT_FDCWD) return path;
  path_of(folder, buffer);
  strncat(buffer, "/", PATH_MAX - strlen(buffer) - 1);
  strncat(buffer, path, PATH_MAX - strlen(buffer) - 1);
  return buffer;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FD(call) (armed && strikes(call, path_of(fd, (char[PATH_MAX]){0})))
#define AT(call, folder, path) (armed && strikes(call, path_at(folder, path, (char[PATH_MAX]){0})))

#define WRITE(really_write) \
  if (FD(" write ")) { \
    if (error != SHORT) return -1; \
    count = (count + 1) / 2; \
  } \
  return really_write
ssize_t write(int fd, const void *data, size_t count) { WRITE(REAL(write)(fd, data, count)); }
ssize_t pwrite(int fd, const void *data, size_t count, off_t at) { WRITE(REAL(pwrite)(fd, data, count, at)); }
ssize_t pwrite64(int fd, const void *data, size_t count, off64_t at) { WRITE(REAL(pwrite64)(fd, data, count, at)); }
ssize_t writev(int fd, const struct iovec *parts, int count) {
  if (!FD(" write ")) return REAL(writev)(fd, parts, count);
  return error == SHORT ? REAL(writev)(fd, parts, (count + 1) / 2) : -1;
}
ssize_t read(int fd, void *data, size_t count) { return FD(" read ") ? -1 : REAL(read)(fd, data, count); }
ssize_t pread64(int fd, void *data, size_t n, off64_t at) { return FD(" read ") ? -1 : REAL(pread64)(fd, data, n, at); }
ssize_t readv(int fd, const struct iovec *parts, int n) { return FD(" read ") ? -1 : REAL(readv)(fd, parts, n); }
ssize_t preadv64(int fd, const struct iovec *parts, int n, off64_t at) {
  return FD(" read ") ? -1 : REAL(preadv64)(fd, parts, n, at);
}
int fsync(int fd) { return FD(" fsync ") ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return FD(" fsync ") ? -1 : REAL(fdatasync)(fd); }

#define OPEN(folder, really_open) \
  va_list rest; \
  va_start(rest, flags); \
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
  va_end(rest); \
  int writes = flags & (O_WRONLY | O_RDWR | O_CREAT); \
  if (AT(" open ", folder, path) || (writes && AT(" create ", folder, path))) return -1; \
  return really_open
int open(const char *path, int flags, ...) { OPEN(AT_FDCWD, REAL(open)(path, flags, mode)); }
int open64(const char *path, int flags, ...) { OPEN(AT_FDCWD, REAL(open64)(path, flags, mode)); }
int openat(int at, const char *path, int flags, ...) { OPEN(at, REAL(openat)(at, path, flags, mode)); }
int openat64(int at, const char *path, int flags, ...) { OPEN(at, REAL(openat64)(at, path, flags, mode)); }

int mkdir(const char *path, mode_t mode) { return AT(" mkdir ", AT_FDCWD, path) ? -1 : REAL(mkdir)(path, mode); }
int unlink(const char *path) { return AT(" unlink ", AT_FDCWD, path) ? -1 : REAL(unlink)(path); }
int rmdir(const char *path) { return AT(" unlink ", AT_FDCWD, path) ? -1 : REAL(rmdir)(path); }
int unlinkat(int at, const char *path, int flags) { return AT(" unlink ", at, path) ? -1 : REAL(unlinkat)(at, path, flags); }
int rename(const char *from, const char *to) { return AT(" rename ", AT_FDCWD, from) ? -1 : REAL(rename)(from, to); }
int link(const char *from, const char *to) { return AT(" link ", AT_FDCWD, to) ? -1 : REAL(link)(from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) {
  return AT(" link ", b, to) ? -1 : REAL(linkat)(a, from, b, to, flags);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  int failed = REAL(clock_gettime)(clock, now);
  if (!failed && clock == CLOCK_REALTIME && armed && strstr(calls, " clock ")) {
    struck++;
    now->tv_sec += (seen++ % 2 ? 1 : -1) * (random() % (400 * 86400)); /* up to 400 days forth and back */
  }
  return failed;
}
