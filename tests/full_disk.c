/* LD_PRELOAD: below one folder the disk is full, or fails, from a chosen operation on: in Python and in native code.

   FULL_DISK names a file of the struct below, which all processes share and the test sets; FULL_DISK_LOG one that gets
   a line "KIND PATH" for each operation. Every call that takes room
   (creates, writes, grows, renames) or flushes (fsync, close of what could be written) is an operation and counted;
   from number `at` on those of the chosen kinds fail. A short write, of half the bytes, may come before. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { ROOM = 1, FLUSH = 2 };

static struct {
  long count;   /* operations of the chosen kinds so far */
  long at;      /* the first that fails; -1: none */
  int kinds;    /* ROOM, FLUSH or both */
  int code;     /* errno */
  int halved;   /* 1: a short write comes first; 2: it has come */
  char folder[PATH_MAX];
} *state;
static int records = -1;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void begin(void) {
  const char *name = getenv("FULL_DISK");
  int fd = name ? open(name, O_RDWR) : -1;
  void *found = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (fd >= 0) REAL(close)(fd);
  const char *path = getenv("FULL_DISK_LOG");
  int opened = path ? open(path, O_WRONLY | O_APPEND) : -1;
  records = opened < 0 ? -1 : fcntl(opened, F_DUPFD_CLOEXEC, 500);
  if (opened >= 0) REAL(close)(opened);
  state = found == MAP_FAILED ? NULL : found;
}

static int fails(int kind, const char *path) {
  if (!state || !(state->kinds & kind) || strncmp(path, state->folder, strlen(state->folder))) return 0;
  long number = __atomic_fetch_add(&state->count, 1, __ATOMIC_SEQ_CST);
  if (records >= 0) {
    char line[PATH_MAX + 8];
    int length = snprintf(line, sizeof line, "%d %s\n", kind, path);
    if (REAL(write)(records, line, length) < 0) abort();
  }
  if (state->at < 0 || number < state->at) return 0;
  errno = state->code;
  return 1;
}

static int fails_fd(int kind, int fd) {
  char link[40], path[PATH_MAX];
  struct stat found;
  if (!state || fstat(fd, &found) || !S_ISREG(found.st_mode)) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  path[length < 0 ? 0 : length] = 0;
  return fails(kind, path);
}

static int fails_at(int kind, int folder, const char *name) {
  char link[40], path[2 * PATH_MAX];
  ssize_t length = 0;
  if (!state) return 0;
  if (*name != '/') {
    snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
    length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length++] = '/';
  }
  snprintf(path + length, PATH_MAX, "%s", name);
  return fails(kind, path);
}

/* How many of n bytes to write before the failure: none, or half of them once. */
static size_t before(size_t n) { return state->halved == 1 && n > 1 ? (state->halved = 2, n / 2) : 0; }

ssize_t write(int fd, const void *data, size_t n) {
  if (!fails_fd(ROOM, fd)) return REAL(write)(fd, data, n);
  size_t some = before(n);
  return some ? REAL(write)(fd, data, some) : -1;
}

#define PWRITE(name, offset_type)                                              \
  ssize_t name(int fd, const void *data, size_t n, offset_type offset) {      \
    if (!fails_fd(ROOM, fd)) return REAL(name)(fd, data, n, offset);           \
    size_t some = before(n);                                                   \
    return some ? REAL(name)(fd, data, some, offset) : -1;                     \
  }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec *parts, int n) {
  return fails_fd(ROOM, fd) ? -1 : REAL(writev)(fd, parts, n);
}

size_t fwrite(const void *data, size_t size, size_t n, FILE *file) { /* glibc's own call of write is not this one */
  return fails_fd(ROOM, fileno(file)) ? 0 : REAL(fwrite)(data, size, n, file);
}

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t n, unsigned flags) {
  return fails_fd(ROOM, out) ? -1 : REAL(copy_file_range)(in, from, out, to, n, flags);
}

ssize_t sendfile(int out, int in, off_t *from, size_t n) {
  return fails_fd(ROOM, out) ? -1 : REAL(sendfile)(out, in, from, n);
}

int posix_fallocate(int fd, off_t from, off_t n) {
  return fails_fd(ROOM, fd) ? state->code : REAL(posix_fallocate)(fd, from, n);
}

static int shorter(int fd, off_t n) {
  struct stat found;
  return !fstat(fd, &found) && n <= found.st_size;
}

int ftruncate(int fd, off_t n) { return !shorter(fd, n) && fails_fd(ROOM, fd) ? -1 : REAL(ftruncate)(fd, n); }
int ftruncate64(int fd, off64_t n) { return !shorter(fd, n) && fails_fd(ROOM, fd) ? -1 : REAL(ftruncate64)(fd, n); }
int fsync(int fd) { return fails_fd(FLUSH, fd) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return fails_fd(FLUSH, fd) ? -1 : REAL(fdatasync)(fd); }

int close(int fd) { /* of a file that was written, it reports what went wrong late; the number is free all the same */
  int flags = state ? fcntl(fd, F_GETFL) : -1;
  int wrong = flags >= 0 && (flags & O_ACCMODE) != O_RDONLY && fails_fd(FLUSH, fd);
  int code = errno, done = REAL(close)(fd);
  if (wrong) errno = code;
  return wrong ? -1 : done;
}

#define OPEN(name, declared, passed, folder)                                   \
  int name declared {                                                          \
    struct stat found;                                                         \
    int mode = 0;                                                              \
    if (flags & (O_CREAT | O_TMPFILE)) {                                       \
      va_list rest;                                                            \
      va_start(rest, flags);                                                   \
      mode = va_arg(rest, int);                                                \
      va_end(rest);                                                            \
      if (fstatat(folder, path, &found, AT_SYMLINK_NOFOLLOW) && fails_at(ROOM, folder, path)) return -1; \
    }                                                                          \
    return REAL(name) passed;                                                  \
  }
OPEN(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode), at)
OPEN(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode), at)

int mkdirat(int at, const char *path, mode_t mode) {
  struct stat found;
  return fstatat(at, path, &found, AT_SYMLINK_NOFOLLOW) && fails_at(ROOM, at, path) ? -1 : REAL(mkdirat)(at, path, mode);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int rename(const char *old, const char *new) {
  return fails_at(ROOM, AT_FDCWD, new) ? -1 : REAL(rename)(old, new);
}
int renameat(int from, const char *old, int to, const char *new) {
  return fails_at(ROOM, to, new) ? -1 : REAL(renameat)(from, old, to, new);
}
