// Lets one chosen system call on the files of a test fail, or do half of its work; a library for LD_PRELOAD, on Linux.
//
//     cc -shared -fPIC -O1 -o faults.so faults.c
//     FAULT_ROOT=/tmp/t FAULT_LOG=/tmp/log FAULT_CALL=pwrite FAULT_N=3 FAULT_KIND=SHORT LD_PRELOAD=./faults.so convert ...
//
// Only calls on what lies below FAULT_ROOT count (a path without links in it), from 1. FAULT_LOG gets a line for each of them,
// "pwrite /tmp/t/out/file", and the one that was struck begins with "!". A process that is preloaded and forks does the same
// with faults_arm(). Calls go to the kernel themselves: nobody else's wrappers are between, and nothing has to be looked up.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define SHORT (-1)
#define ALIAS(new, old) __typeof(old) new __attribute__((alias(#old)))

static char root[PATH_MAX], chosen[32];
static int kind, journal = -1;
static atomic_long left;

// The n-th `call` below `folder` fails with `how`, an errno or SHORT; all are written to the file `log`, if not -1.
void faults_arm(const char *folder, const char *call, long n, int how, int log) {
    snprintf(chosen, sizeof chosen, "%s", call);
    kind = how, journal = log, left = n;
    snprintf(root, sizeof root, "%s", folder);
}

__attribute__((constructor)) static void arm_by_environment(void) {
    const char *folder = getenv("FAULT_ROOT"), *log = getenv("FAULT_LOG");
    const char *call = getenv("FAULT_CALL"), *n = getenv("FAULT_N"), *how = getenv("FAULT_KIND");
    const char *names[] = {"EIO", "ENOSPC", "EACCES", "EINTR", "SHORT"};
    const int kinds[] = {EIO, ENOSPC, EACCES, EINTR, SHORT};
    int found = 0;
    for (int i = 0; how && i < 5; i++)
        found = strcmp(how, names[i]) ? found : kinds[i];
    int to = log ? syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
    if (folder)
        faults_arm(folder, call ? call : "", n ? atol(n) : 0, found, to);
}

// What this call shall suffer: 0 for nothing, an errno, or SHORT.
static int struck(const char *call, const char *path) {
    size_t length = strlen(root);
    if (!length || strncmp(path, root, length) || (path[length] && path[length] != '/'))
        return 0;
    int hit = !strcmp(call, chosen) && atomic_fetch_sub(&left, 1) == 1;
    char line[PATH_MAX + 40];
    int size = snprintf(line, sizeof line, "%s%s %s\n", hit ? "!" : "", call, path);
    if (journal >= 0)
        syscall(SYS_write, journal, line, size);
    return hit ? kind : 0;
}

static void path_of(int fd, char path[PATH_MAX]) {
    char link[40];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long size = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    path[size < 0 ? 0 : size] = 0;
}

static int on_file(const char *call, int fd) {
    int before = errno;
    char path[PATH_MAX];
    path_of(fd, path);
    errno = before;
    return struck(call, path);
}

static int on_path(const char *call, int folder, const char *name) {
    char path[PATH_MAX] = "", whole[2 * PATH_MAX];
    int before = errno, skipped = 0;
    if (sscanf(name, "/proc/self/fd/%d/%n", &folder, &skipped) == 1 && skipped)
        name += skipped; // TensorStore writes below an open directory
    if (*name != '/' && folder != AT_FDCWD)
        path_of(folder, path);
    else if (*name != '/' && syscall(SYS_getcwd, path, sizeof path) < 0)
        *path = 0;
    errno = before;
    snprintf(whole, sizeof whole, "%s%s%s", path, *path ? "/" : "", name);
    return struck(call, whole);
}

static long fail(int error) {
    errno = error;
    return -1;
}

// Bodies of functions that can do no half of their work, and of those that can: `size` is what they are asked for.
#define WHOLE(fault, result) { \
    int f = fault; \
    return f > 0 ? fail(f) : (result); }
#define PARTLY(fault, size, result) { \
    int f = fault; \
    if (f == SHORT && size > 1) size /= 2; \
    return f > 0 ? fail(f) : (result); }

// Opening: files that must be there, files that may be made, directories that are listed.

static int opened(int folder, const char *path, int flags, mode_t mode)
    WHOLE(on_path(flags & O_CREAT ? "create" : "open", folder, path), syscall(SYS_openat, folder, path, flags, mode))

#define MODE(last) \
    va_list rest; \
    va_start(rest, last); \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);
int open(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE(flags) return opened(folder, path, flags, mode); }
int __open_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags, 0); }
int __openat_2(int folder, const char *path, int flags) { return opened(folder, path, flags, 0); }
ALIAS(open64, open); ALIAS(openat64, openat); ALIAS(__open64_2, __open_2); ALIAS(__openat64_2, __openat_2);

DIR *opendir(const char *path) {
    int f = on_path("opendir", AT_FDCWD, path);
    long fd = f > 0 ? fail(f) : syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return fd < 0 ? NULL : fdopendir(fd);
}

// Reading and writing. Of several buffers, half of the first one counts as half.

static struct iovec half(const struct iovec *parts) {
    return (struct iovec){parts->iov_base, parts->iov_len > 1 ? parts->iov_len / 2 : parts->iov_len};
}
#define PARTS(call, number, ...) { \
    int f = on_file(call, fd); \
    struct iovec one = count > 0 ? half(parts) : (struct iovec){0}; \
    if (f == SHORT && count > 0) parts = &one, count = 1; \
    return f > 0 ? fail(f) : syscall(number, fd, parts, count __VA_OPT__(,) __VA_ARGS__); }

ssize_t read(int fd, void *data, size_t size) PARTLY(on_file("read", fd), size, syscall(SYS_read, fd, data, size))
ssize_t pread(int fd, void *data, size_t size, off_t at)
    PARTLY(on_file("pread", fd), size, syscall(SYS_pread64, fd, data, size, at))
ssize_t readv(int fd, const struct iovec *parts, int count) PARTS("read", SYS_readv)
ssize_t preadv(int fd, const struct iovec *parts, int count, off_t at) PARTS("pread", SYS_preadv, at, 0)
ssize_t preadv2(int fd, const struct iovec *parts, int count, off_t at, int flags) PARTS("pread", SYS_preadv2, at, 0, flags)
ALIAS(pread64, pread); ALIAS(preadv64, preadv); ALIAS(preadv64v2, preadv2);

ssize_t write(int fd, const void *data, size_t size) PARTLY(on_file("write", fd), size, syscall(SYS_write, fd, data, size))
ssize_t pwrite(int fd, const void *data, size_t size, off_t at)
    PARTLY(on_file("pwrite", fd), size, syscall(SYS_pwrite64, fd, data, size, at))
ssize_t writev(int fd, const struct iovec *parts, int count) PARTS("write", SYS_writev)
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) PARTS("pwrite", SYS_pwritev, at, 0)
ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t at, int flags) PARTS("pwrite", SYS_pwritev2, at, 0, flags)
ALIAS(pwrite64, pwrite); ALIAS(pwritev64, pwritev); ALIAS(pwritev64v2, pwritev2);

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags)
    PARTLY(on_file("copy_file_range", out), size, syscall(SYS_copy_file_range, in, from, out, to, size, flags))
ssize_t sendfile(int out, int in, off_t *from, size_t size)
    PARTLY(on_file("sendfile", out), size, syscall(SYS_sendfile, out, in, from, size))
ALIAS(sendfile64, sendfile);

// The rest of what changes a disk. Where nobody can cut the power, a sync that does not fail has nothing to do.

int fsync(int fd) WHOLE(on_file("fsync", fd), *root ? 0 : syscall(SYS_fsync, fd))
int fdatasync(int fd) WHOLE(on_file("fsync", fd), *root ? 0 : syscall(SYS_fdatasync, fd))

int fallocate(int fd, int mode, off_t at, off_t size)
    WHOLE(on_file("fallocate", fd), syscall(SYS_fallocate, fd, mode, at, size))
int posix_fallocate(int fd, off_t at, off_t size) { return fallocate(fd, 0, at, size) ? errno : 0; }
int ftruncate(int fd, off_t size) WHOLE(on_file("truncate", fd), syscall(SYS_ftruncate, fd, size))
int truncate(const char *path, off_t size) WHOLE(on_path("truncate", AT_FDCWD, path), syscall(SYS_truncate, path, size))
ALIAS(fallocate64, fallocate); ALIAS(posix_fallocate64, posix_fallocate);
ALIAS(ftruncate64, ftruncate); ALIAS(truncate64, truncate);

int renameat2(int from, const char *old, int to, const char *new, unsigned flags)
    WHOLE(on_path("rename", to, new), syscall(SYS_renameat2, from, old, to, new, flags))
int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }

int mkdirat(int folder, const char *path, mode_t mode)
    WHOLE(on_path("mkdir", folder, path), syscall(SYS_mkdirat, folder, path, mode))
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int unlinkat(int folder, const char *path, int flags)
    WHOLE(on_path("unlink", folder, path), syscall(SYS_unlinkat, folder, path, flags))
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
