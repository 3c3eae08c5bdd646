/* What the files of the Windows victim share. */
#ifndef WINHOST_H
#define WINHOST_H
#define _WIN32_WINNT 0x0a00
#include <windows.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Counters that a test reads from outside while this process stands still:
   8-byte words in this order, then text. The test package knows the layout. */
struct block {
	volatile uint64_t entry, scratch;
	volatile uint64_t calls;  /* of the code */
	volatile int64_t value;   /* what it returned last */
	volatile uint64_t wrong;  /* values that are neither old nor new */
	volatile uint64_t faults; /* waits that ended wrongly, registers that changed */
	volatile uint64_t sleeps, reads, rounds; /* work of the other kinds of threads */
	char example[128];        /* of the first thing that was wrong */
	char pad[512 - 9 * 8 - 128];
};
_Static_assert(sizeof(struct block) == 512, "the test package knows the layout");

enum { WRONG, FAULT };

extern struct block *shared;
extern int old_value, new_value;

int answer(int);

void die(const char *what, const char *name) __attribute__((noreturn));
void note(int kind, const char *what, long long got, long long want);
void new_thread(LPTHREAD_START_ROUTINE f, void *arg);

/* workers.c */
int call_once(void);
void start_workers(int spin, int block, int sleep, int regs, int churn);

/* tracer.c */
void trace(DWORD pid) __attribute__((noreturn));
#endif
