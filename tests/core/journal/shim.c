/* LD_PRELOAD: while the file that FAIL_FSYNC (or FAIL_WRITE) names exists, fsync fails with EIO (writes with ENOSPC),
 * for files whose path ends in .db or .db-wal. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int failing(const char *name, int fd) {
    const char *flag = getenv(name);
    char link[64], path[4096];
    ssize_t length;
    if (!flag || access(flag, F_OK))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return strstr(path, ".db") != NULL;
}

#define REAL(name, type) ((type)dlsym(RTLD_NEXT, name))

int fsync(int fd) {
    if (failing("FAIL_FSYNC", fd)) { errno = EIO; return -1; }
    return REAL("fsync", int (*)(int))(fd);
}

int fdatasync(int fd) {
    if (failing("FAIL_FSYNC", fd)) { errno = EIO; return -1; }
    return REAL("fdatasync", int (*)(int))(fd);
}

ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t at) {
    if (failing("FAIL_WRITE", fd)) { errno = ENOSPC; return -1; }
    return REAL("pwrite64", ssize_t (*)(int, const void *, size_t, off64_t))(fd, bytes, count, at);
}

ssize_t write(int fd, const void *bytes, size_t count) {
    if (failing("FAIL_WRITE", fd)) { errno = ENOSPC; return -1; }
    return REAL("write", ssize_t (*)(int, const void *, size_t))(fd, bytes, count);
}
