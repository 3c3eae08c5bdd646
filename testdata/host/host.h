/* What the files of the PE host share. */
#ifndef HOST_H
#define HOST_H
#include <asm/prctl.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define BLOCKS 128
#define MAX_ALLOW 16
#define MAX_MODULES 64
#define MAX_CHILDREN 16
#define PROBE 0x5a5a0000000ull

/* One life's counters, readable from outside while it stands still. The test
   package reads this layout: 8-byte words in this order, then text. */
struct block {
	volatile uint64_t next;    /* block 0 only: lives so far */
	volatile uint64_t index, pid, base, entry, scratch;
	volatile uint64_t calls;   /* of the export */
	volatile uint64_t wrong;   /* values that are not allowed */
	volatile uint64_t faults;  /* system calls that ended wrongly, registers that changed */
	volatile uint64_t threads; /* main and control thread included, churning ones not */
	volatile int64_t value;    /* of the last call */
	volatile uint64_t alt_tid, alt_sp, alt_pc; /* of the thread that stands on its signal stack */
	volatile uint64_t sleeps, reads, fprounds; /* work done by the other kinds of threads */
	volatile uint64_t lates;   /* sleeps more than a second too long */
	volatile uint64_t signals, signal_sum; /* that came to the receiver, and the values they carried */
	char example[128];         /* of the first thing that was wrong */
	volatile uint64_t waits, eintrs; /* of calls that a stop may end: right ends, and EINTR */
	volatile uint64_t handled; /* signals that were to interrupt them */
	char pad[512 - 23 * 8 - 128];
};
_Static_assert(sizeof(struct block) == 512, "the test package knows the layout");

struct options {
	const char *dll, *call, *map, *shared;
	uint64_t base;
	int arg, spin, fp, sleep, block, churn, altstack, wait;
	int allow[MAX_ALLOW], allowed;
};

struct module {
	char path[4096];
	uint8_t *base;
	uint32_t size;
};

typedef int (*export_fn)(int) __attribute__((ms_abi));

enum { WRONG, FAULT };

extern struct block *shared;
extern struct options opt;
extern char **arguments;
extern struct module *main_module;
extern volatile export_fn called;
extern char scratch[64];

void die(const char *what, const char *name) __attribute__((noreturn));
void note_fault(int kind, const char *what, long got, long want);
void make_teb(void);
void new_thread(void *(*f)(void *), void *arg);
void take_block(void);

/* image.c */
struct module *load_module(const char *path, uint64_t base);
void unload_module(struct module *m);
export_fn find_export(struct module *m, const char *name);

/* workers.c */
void start_workers(void);
int call_once(void);
void pause_calls(int on);
int stand_on_signal_stack(void);
int start_receiver(void);
void nap(long us);
void own_signals(stack_t *s);
void check_signals(const stack_t *s);

/* waits.c */
void start_waiters(void);
void tell_waiters(char *line, size_t size);

/* control.c */
void *control(void *);
void wait_as_leader(void);
void trace(int pid) __attribute__((noreturn));
#endif
