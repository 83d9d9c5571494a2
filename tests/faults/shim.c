/* Loaded with LD_PRELOAD: counts the calls that touch files below one folder, and spoils the n-th.
 *
 * Nothing happens until `faults_arm`. A call counts if it is of one of the armed kinds, is made by the process that
 * armed, and its path, or the path of its descriptor, is the folder or lies below it.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* The kinds of calls and what happens at the n-th; calls.py has the same numbers. */
enum { CREATE = 1, WRITE = 2, SYNC = 4, NAME = 8, REMOVE = 16, SIZE = 32, MODE = 64, CLOSE = 128 };
enum { OPEN = 256, READ = 512 };
enum { NOTHING, KILL, TEAR, FAIL, FULL, SHORT, SIGNAL, SIGNAL_TWICE };

static char folder[PATH_MAX];
static size_t folder_length;
static int armed_pid, armed_kinds, action, argument; /* argument: an error number, or a signal's */
static long target;
static atomic_long counter;
static atomic_int struck;
static char record[1 << 20]; /* a line for each counted call */
static atomic_size_t recorded;

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

void faults_arm(const char *below, long number, int what, int kinds, int with) {
    snprintf(folder, sizeof folder, "%s", below);
    folder_length = strlen(folder);
    target = number, action = what, armed_kinds = kinds, argument = with;
    memset(record, 0, sizeof record);
    atomic_store(&recorded, 0);
    atomic_store(&counter, 0);
    atomic_store(&struck, 0);
    armed_pid = getpid();
}

long faults_count(void) { return counter; }
int faults_struck(void) { return struck; }
const char *faults_record(void) { return record; }

static int inside(const char *path) {
    return !strncmp(path, folder, folder_length) && (path[folder_length] == '/' || !path[folder_length]);
}

static int path_of(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return length > 0;
}

static void absolute(int base, const char *name, char *path) {
    char start[PATH_MAX] = "";
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return;
    }
    if (base == AT_FDCWD) {
        if (!getcwd(start, sizeof start)) start[0] = 0;
    } else {
        path_of(base, start);
    }
    if (snprintf(path, PATH_MAX, "%s/%s", start, name) >= PATH_MAX) path[0] = 0;
}

static void send_signal(int number) { syscall(SYS_kill, armed_pid, number); }

/* Whether the counted call has to fail, with errno set; 2: a write takes half of its bytes; 3: half, then the end. */
static int strike(int kind, const char *name, const char *path) {
    if (getpid() != armed_pid || !(armed_kinds & kind) || !inside(path)) return 0;
    long number = ++counter;
    if (!target) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%s %s\n", name, path + folder_length);
        size_t at = atomic_fetch_add(&recorded, length);
        if (at + length < sizeof record) memcpy(record + at, line, length);
        return 0;
    }
    if (action == SIGNAL_TWICE && number == target + 1) send_signal(argument);
    if (action == FULL ? number < target : number != target) return 0;
    struck = 1;
    switch (action) {
    case KILL: send_signal(SIGKILL); break;
    case TEAR: return 3;
    case SHORT: return 2;
    case SIGNAL: case SIGNAL_TWICE: send_signal(argument); break;
    case FULL: if (number == target && kind == WRITE) return 2; /* the last bytes that fit */ /* fallthrough */
    case FAIL: errno = argument; return 1;
    }
    return 0;
}

static int strike_path(int kind, const char *name, int base, const char *file) {
    char path[PATH_MAX];
    if (!armed_pid || !file) return 0;
    absolute(base, file, path);
    return strike(kind, name, path);
}

static int strike_handle(int kind, const char *name, int descriptor) {
    char path[PATH_MAX];
    if (!armed_pid || getpid() != armed_pid) return 0;
    int before = errno;
    int found = path_of(descriptor, path);
    errno = before;
    return found ? strike(kind, name, path) : 0;
}

static int kind_of(int flags) { return flags & (O_CREAT | O_TRUNC) ? CREATE : OPEN; }

#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        return strike_path(kind_of(flags), #name, AT_FDCWD, path) ? -1 : real(path, flags, mode); \
    }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name) \
    int name(int base, const char *path, int flags, ...) { \
        REAL(name); \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        return strike_path(kind_of(flags), #name, base, path) ? -1 : real(base, path, flags, mode); \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

/* C streams and those of C++ are opened here; C++ then writes to the descriptor. */
#define OPENS_STREAM(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(name); \
        return strike_path(strpbrk(mode, "wa") ? CREATE : OPEN, #name, AT_FDCWD, path) ? NULL : real(path, mode); \
    }
OPENS_STREAM(fopen)
OPENS_STREAM(fopen64)

DIR *opendir(const char *path) {
    REAL(opendir);
    return strike_path(OPEN, "opendir", AT_FDCWD, path) ? NULL : real(path);
}

#define BY_PATH(kind, name, declared, path, given) \
    int name declared { \
        REAL(name); \
        return strike_path(kind, #name, AT_FDCWD, path) ? -1 : real given; \
    }
#define AT_PATH(kind, name, declared, base, path, given) \
    int name declared { \
        REAL(name); \
        return strike_path(kind, #name, base, path) ? -1 : real given; \
    }
#define BY_HANDLE(kind, name, declared, handle, given) \
    int name declared { \
        REAL(name); \
        return strike_handle(kind, #name, handle) ? -1 : real given; \
    }

BY_PATH(CREATE, creat, (const char *path, mode_t mode), path, (path, mode))
BY_PATH(CREATE, creat64, (const char *path, mode_t mode), path, (path, mode))
BY_PATH(NAME, rename, (const char *from, const char *to), to, (from, to))
AT_PATH(NAME, renameat, (int a, const char *from, int b, const char *to), b, to, (a, from, b, to))
AT_PATH(NAME, renameat2, (int a, const char *from, int b, const char *to, unsigned flags), b, to,
        (a, from, b, to, flags))
BY_PATH(NAME, link, (const char *from, const char *to), to, (from, to))
AT_PATH(NAME, linkat, (int a, const char *from, int b, const char *to, int flags), b, to, (a, from, b, to, flags))
BY_PATH(NAME, symlink, (const char *from, const char *to), to, (from, to))
AT_PATH(NAME, symlinkat, (const char *from, int b, const char *to), b, to, (from, b, to))
BY_PATH(CREATE, mkdir, (const char *path, mode_t mode), path, (path, mode))
AT_PATH(CREATE, mkdirat, (int base, const char *path, mode_t mode), base, path, (base, path, mode))
BY_PATH(REMOVE, unlink, (const char *path), path, (path))
AT_PATH(REMOVE, unlinkat, (int base, const char *path, int flags), base, path, (base, path, flags))
BY_PATH(REMOVE, remove, (const char *path), path, (path))
BY_PATH(REMOVE, rmdir, (const char *path), path, (path))
BY_PATH(SIZE, truncate, (const char *path, off_t size), path, (path, size))
BY_PATH(SIZE, truncate64, (const char *path, off64_t size), path, (path, size))
BY_HANDLE(SIZE, ftruncate, (int handle, off_t size), handle, (handle, size))
BY_HANDLE(SIZE, ftruncate64, (int handle, off64_t size), handle, (handle, size))
BY_PATH(MODE, chmod, (const char *path, mode_t mode), path, (path, mode))
BY_HANDLE(MODE, fchmod, (int handle, mode_t mode), handle, (handle, mode))
AT_PATH(MODE, fchmodat, (int base, const char *path, mode_t mode, int flags), base, path, (base, path, mode, flags))
BY_HANDLE(SYNC, fsync, (int handle), handle, (handle))
BY_HANDLE(SYNC, fdatasync, (int handle), handle, (handle))

/* These return the error instead of setting errno. */
#define ALLOCATES(name, type) \
    int name(int handle, type start, type size) { \
        REAL(name); \
        return strike_handle(SIZE, #name, handle) ? errno : real(handle, start, size); \
    }
ALLOCATES(posix_fallocate, off_t)
ALLOCATES(posix_fallocate64, off64_t)

/* The system writes behind, and says at the end what went wrong; the descriptor is closed all the same. */
int close(int handle) {
    REAL(close);
    int writable = armed_pid && (fcntl(handle, F_GETFL) & O_ACCMODE) != O_RDONLY;
    int spoiled = writable && strike_handle(CLOSE, "close", handle);
    int before = errno;
    int result = real(handle);
    if (!spoiled) return result;
    errno = before;
    return -1;
}

/* How many of `size` bytes a write may take; -1: none, it fails. */
static ssize_t allowed(const char *name, int handle, size_t size, int *torn) {
    int how = strike_handle(WRITE, name, handle);
    *torn = how == 3;
    return how == 1 ? -1 : how == 0 ? (ssize_t)size : (ssize_t)(size > 1 ? size / 2 : size);
}

#define WRITES(name, declared, given) \
    ssize_t name declared { \
        REAL(name); \
        int torn; \
        ssize_t left = allowed(#name, handle, size, &torn); \
        if (left < 0) return -1; \
        ssize_t done = real given; \
        if (torn) send_signal(SIGKILL); \
        return done; \
    }
WRITES(write, (int handle, const void *bytes, size_t size), (handle, bytes, left))
WRITES(pwrite, (int handle, const void *bytes, size_t size, off_t at), (handle, bytes, left, at))
WRITES(pwrite64, (int handle, const void *bytes, size_t size, off64_t at), (handle, bytes, left, at))
WRITES(sendfile, (int handle, int from, off_t *at, size_t size), (handle, from, at, left))
WRITES(sendfile64, (int handle, int from, off64_t *at, size_t size), (handle, from, at, left))
WRITES(copy_file_range, (int from, off64_t *a, int handle, off64_t *b, size_t size, unsigned flags),
       (from, a, handle, b, left, flags))

/* Of several parts a shortened write takes the first, or half of a lone one. */
#define WRITES_PARTS(name, declared, given) \
    ssize_t name declared { \
        REAL(name); \
        int how = strike_handle(WRITE, #name, handle); \
        if (how == 1) return -1; \
        struct iovec half; \
        if (how && count > 0) { \
            half = parts[0]; \
            if (count == 1 && half.iov_len > 1) half.iov_len /= 2; \
            parts = &half, count = 1; \
        } \
        ssize_t done = real given; \
        if (how == 3) send_signal(SIGKILL); \
        return done; \
    }
WRITES_PARTS(writev, (int handle, const struct iovec *parts, int count), (handle, parts, count))
WRITES_PARTS(pwritev, (int handle, const struct iovec *parts, int count, off_t at), (handle, parts, count, at))
WRITES_PARTS(pwritev64, (int handle, const struct iovec *parts, int count, off64_t at), (handle, parts, count, at))

#define READS(name, declared, given) \
    ssize_t name declared { \
        REAL(name); \
        return strike_handle(READ, #name, handle) ? -1 : real given; \
    }
READS(read, (int handle, void *bytes, size_t size), (handle, bytes, size))
READS(pread, (int handle, void *bytes, size_t size, off_t at), (handle, bytes, size, at))
READS(pread64, (int handle, void *bytes, size_t size, off64_t at), (handle, bytes, size, at))
