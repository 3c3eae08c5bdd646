/* Threads that wait without a time limit in calls that the kernel does not make
   again by itself after a stop (signal(7)). They count every EINTR: one is right
   only where a signal of the test was handled. */
#define _GNU_SOURCE
#include "host.h"
#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/sem.h>

#define WAKE (SIGRTMIN + 1)      /* that rt_sigtimedwait waits for */
#define INTERRUPT (SIGRTMIN + 2) /* has a handler, without SA_RESTART */

enum { EPOLL_WAIT, EPOLL_PWAIT, EPOLL_PWAIT2, SEMOP, SEMTIMEDOP, SIGWAIT, AIO, URING, KINDS };
static const char *const names[KINDS] = {"epoll_wait", "epoll_pwait", "epoll_pwait2", "semop", "semtimedop", "rt_sigtimedwait", "io_getevents", "io_uring_enter"};

struct wait {
	int kind, event, epoll, sem;
	volatile int tid;
	aio_context_t aio;
	int ring, zero;
	unsigned *sq_tail, *sq_array, *cq_head, *cq_tail, sq_mask;
	struct io_uring_sqe *sqes;
	volatile uint64_t interrupted;
};
static struct wait waits[KINDS];

static void count(volatile uint64_t *n) { __atomic_fetch_add(n, 1, __ATOMIC_RELAXED); }

static void on_interrupt(int sig) { count(&shared->handled); }

static int prepare_ring(struct wait *w)
{
	struct io_uring_params p = {0};
	w->ring = (int)syscall(SYS_io_uring_setup, 4, &p);
	if (w->ring < 0)
		return 0;
	size_t sq = p.sq_off.array + p.sq_entries * 4, cq = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
	uint8_t *s = mmap(NULL, sq, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, w->ring, IORING_OFF_SQ_RING);
	uint8_t *c = mmap(NULL, cq, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, w->ring, IORING_OFF_CQ_RING);
	w->sqes = mmap(NULL, p.sq_entries * sizeof *w->sqes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, w->ring, IORING_OFF_SQES);
	if (s == MAP_FAILED || c == MAP_FAILED || w->sqes == MAP_FAILED)
		die("mmap", "io_uring");
	w->sq_tail = (unsigned *)(s + p.sq_off.tail);
	w->sq_array = (unsigned *)(s + p.sq_off.array);
	w->sq_mask = *(unsigned *)(s + p.sq_off.ring_mask);
	w->cq_head = (unsigned *)(c + p.cq_off.head);
	w->cq_tail = (unsigned *)(c + p.cq_off.tail);
	return 1;
}

/* False if this system does not have it. */
static int prepare(struct wait *w)
{
	struct epoll_event in = {.events = EPOLLIN};
	switch (w->kind) {
	case SEMOP:
	case SEMTIMEDOP:
		return (w->sem = semget(IPC_PRIVATE, 1, 0600)) >= 0;
	case SIGWAIT:
		return 1;
	case AIO:
		w->zero = open("/dev/zero", O_RDONLY | O_CLOEXEC);
		return syscall(SYS_io_setup, 4, &w->aio) == 0;
	case URING:
		return prepare_ring(w);
	default:
		w->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		w->epoll = epoll_create1(EPOLL_CLOEXEC);
		return w->event >= 0 && epoll_ctl(w->epoll, EPOLL_CTL_ADD, w->event, &in) == 0;
	}
}

/* Waits once. 1 is right for every kind. */
static long wait_once(struct wait *w)
{
	struct epoll_event e;
	struct sembuf take = {0, -1, 0};
	struct io_event done;
	uint64_t none = 1ull << (SIGUSR2 - 1), wake = 1ull << (WAKE - 1), got;
	siginfo_t info;
	long r;
	switch (w->kind) {
	case EPOLL_WAIT: r = syscall(SYS_epoll_wait, w->epoll, &e, 1, -1); break;
	case EPOLL_PWAIT: r = syscall(SYS_epoll_pwait, w->epoll, &e, 1, -1, &none, 8); break;
	case EPOLL_PWAIT2: r = syscall(SYS_epoll_pwait2, w->epoll, &e, 1, NULL, &none, 8); break;
	case SEMOP: r = syscall(SYS_semop, w->sem, &take, 1); return r ? r : 1;
	case SEMTIMEDOP: r = syscall(SYS_semtimedop, w->sem, &take, 1, NULL); return r ? r : 1;
	case SIGWAIT: r = syscall(SYS_rt_sigtimedwait, &wake, &info, NULL, 8); return r == WAKE ? 1 : r;
	case AIO: return syscall(SYS_io_getevents, w->aio, 1, 1, &done, NULL);
	default:
		r = syscall(SYS_io_uring_enter, w->ring, 0, 1, IORING_ENTER_GETEVENTS, NULL, 0);
		if (r == 0 && *w->cq_head != __atomic_load_n(w->cq_tail, __ATOMIC_ACQUIRE)) {
			__atomic_store_n(w->cq_head, *w->cq_head + 1, __ATOMIC_RELEASE);
			return 1;
		}
		return r;
	}
	if (r == 1 && read(w->event, &got, 8) != 8)
		return -1;
	return r;
}

static void *waiter(void *arg)
{
	struct wait *w = arg;
	stack_t stack;
	make_teb();
	own_signals(&stack);
	if (w->kind == SIGWAIT) {
		sigset_t s;
		sigemptyset(&s);
		sigaddset(&s, WAKE);
		pthread_sigmask(SIG_BLOCK, &s, NULL);
	}
	__atomic_store_n(&w->tid, (int)syscall(SYS_gettid), __ATOMIC_SEQ_CST);
	for (;;) {
		errno = 0;
		long r = wait_once(w);
		if (r < 0 && errno == EINTR) {
			count(&w->interrupted);
			count(&shared->eintrs);
		} else if (r != 1)
			note_fault(FAULT, names[w->kind], errno ? errno : r, 1);
		else
			count(&shared->waits);
		if (w->kind != SIGWAIT)
			check_signals(&stack);
		call_once();
	}
	return NULL;
}

static void wake(struct wait *w)
{
	uint64_t one = 1;
	struct sembuf give = {0, 1, 0};
	static uint8_t byte;
	struct iocb cb = {.aio_lio_opcode = IOCB_CMD_PREAD, .aio_fildes = (uint32_t)w->zero, .aio_buf = (uint64_t)&byte, .aio_nbytes = 1}, *cbs = &cb;
	long r;
	switch (w->kind) {
	case SEMOP:
	case SEMTIMEDOP: r = semop(w->sem, &give, 1); break;
	case SIGWAIT: r = syscall(SYS_tgkill, getpid(), w->tid, WAKE); break;
	case AIO: r = syscall(SYS_io_submit, w->aio, 1, &cbs) - 1; break;
	case URING: {
		unsigned i = *w->sq_tail & w->sq_mask;
		w->sqes[i] = (struct io_uring_sqe){.opcode = IORING_OP_NOP};
		w->sq_array[i] = i;
		__atomic_store_n(w->sq_tail, *w->sq_tail + 1, __ATOMIC_RELEASE);
		do
			r = syscall(SYS_io_uring_enter, w->ring, 1, 0, 0, NULL, 0) - 1;
		while (r < 0 && errno == EINTR);
		break;
	}
	default: r = write(w->event, &one, 8) - 8;
	}
	if (r)
		note_fault(FAULT, "wake", errno, 0);
}

/* Semaphores outlive their program, but not their namespace, which only this
   thread and those it starts have. Without the right to one there are none. */
static void *waker(void *arg)
{
	int own = unshare(CLONE_NEWIPC) == 0;
	make_teb();
	for (int i = 0; i < KINDS; i++) {
		struct wait *w = &waits[i];
		w->kind = i;
		if (((i == SEMOP || i == SEMTIMEDOP) && !own) || !prepare(w))
			continue;
		__atomic_fetch_add(&shared->threads, 1, __ATOMIC_SEQ_CST);
		new_thread(waiter, w);
		while (!w->tid)
			nap(100);
	}
	__atomic_store_n((int *)arg, 1, __ATOMIC_SEQ_CST);
	for (;;) {
		nap(50000);
		for (int i = 0; i < KINDS; i++)
			if (waits[i].tid)
				wake(&waits[i]);
	}
	return NULL;
}

void start_waiters(void)
{
	static volatile int ready;
	struct sigaction a = {.sa_handler = on_interrupt};
	sigaction(INTERRUPT, &a, NULL);
	memset(waits, 0, sizeof waits);
	ready = 0;
	__atomic_fetch_add(&shared->threads, 1, __ATOMIC_SEQ_CST);
	new_thread(waker, (void *)&ready);
	while (!ready)
		nap(100);
}

/* "SIGNAL NAME TID EINTRS ...", of those that wait. */
void tell_waiters(char *line, size_t size)
{
	int n = snprintf(line, size, "%d", INTERRUPT);
	for (int i = 0; i < KINDS; i++)
		if (waits[i].tid && n < (int)size)
			n += snprintf(line + n, size - (size_t)n, " %s %d %lu", names[i], waits[i].tid, (unsigned long)waits[i].interrupted);
}
