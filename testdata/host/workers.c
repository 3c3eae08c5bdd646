/* The threads of the host: they run the code all the time and check themselves. */
#define _GNU_SOURCE
#include "host.h"

char scratch[64];
struct module *main_module;
volatile export_fn called;

static volatile int paused, inside; /* the gate in front of the code, closed while it is unmapped */

void nap(long us)
{
	struct timespec t = {us / 1000000, us % 1000000 * 1000};
	nanosleep(&t, NULL);
}

static void check(int v)
{
	__atomic_fetch_add(&shared->calls, 1, __ATOMIC_RELAXED);
	shared->value = v;
	for (int i = 0; i < opt.allowed; i++)
		if (v == opt.allow[i])
			return;
	if (opt.allowed)
		note_fault(WRONG, "value", v, opt.allow[0]);
}

static int enter(void)
{
	__atomic_fetch_add(&inside, 1, __ATOMIC_SEQ_CST);
	if (!paused)
		return 1;
	__atomic_fetch_sub(&inside, 1, __ATOMIC_SEQ_CST);
	return 0;
}

static void leave(void) { __atomic_fetch_sub(&inside, 1, __ATOMIC_SEQ_CST); }

int call_once(void)
{
	if (!enter())
		return -1;
	int v = called(opt.arg);
	leave();
	check(v);
	return v;
}

void pause_calls(int on)
{
	__atomic_store_n(&paused, on, __ATOMIC_SEQ_CST);
	while (on && __atomic_load_n(&inside, __ATOMIC_SEQ_CST))
		nap(100);
}

static void *spinner(void *arg)
{
	make_teb();
	for (unsigned i = 1;; i++) {
		if (paused)
			nap(1000);
		call_once();
		if (i % 4096 == 0)
			sched_yield(); /* test machines have two processors */
	}
	return NULL;
}

/* What a return from a signal sets besides registers: every worker has a signal
   stack of its own and a mask, and looks from time to time whether they are still so. */
void own_signals(stack_t *s)
{
	sigset_t mask;
	*s = (stack_t){.ss_sp = malloc(64 << 10), .ss_size = 64 << 10};
	sigemptyset(&mask);
	sigaddset(&mask, SIGUSR2);
	if (!s->ss_sp || sigaltstack(s, NULL) || pthread_sigmask(SIG_BLOCK, &mask, NULL))
		die("signal stack", NULL);
}

void check_signals(const stack_t *s)
{
	stack_t now;
	uint64_t mask = 0;
	if (sigaltstack(NULL, &now) || now.ss_flags || now.ss_sp != s->ss_sp || now.ss_size != s->ss_size)
		note_fault(FAULT, "signal stack", (long)now.ss_sp, (long)s->ss_sp);
	if (syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, &mask, 8) || mask != 1ull << (SIGUSR2 - 1))
		note_fault(FAULT, "signal mask", (long)mask, 1l << (SIGUSR2 - 1));
}

/* fp_round(in, out, rounds): fills vector, x87, integer registers and the red
   zone, counts down, and stores or compares them again. Returns how many
   integer registers and red zone words had changed. */
unsigned fp_round_sse(const void *in, void *out, long rounds);
unsigned fp_round_avx(const void *in, void *out, long rounds);
unsigned fp_round_avx512(const void *in, void *out, long rounds);

#define EACH_GPR ".irp r,rax,rbx,rcx,rbp,r8,r9,r10,r11,r12,r13,r14,r15\n"
#define EACH_RED ".irp o,-8,-16,-24,-32,-40,-48,-56,-64,-72,-80,-88,-96,-104,-112,-120,-128\n"
#define FP_ROUND(name, load, store) \
	".globl " name "\n.type " name ",@function\n" name ":\n" \
	"push %rbx\npush %rbp\npush %r12\npush %r13\npush %r14\npush %r15\n" \
	"fldpi\n" load \
	EACH_RED "movq $(0x5a5a000-(\\o)), \\o(%rsp)\n.endr\n" \
	EACH_GPR "mov $0x1234567, %\\r\n.endr\n" \
	"1: dec %rdx\njnz 1b\n" \
	EACH_GPR "cmp $0x1234567, %\\r\nje 2f\ninc %rdx\n2:\n.endr\n" \
	EACH_RED "cmpq $(0x5a5a000-(\\o)), \\o(%rsp)\nje 2f\ninc %rdx\n2:\n.endr\n" \
	store "fstpl 2048(%rsi)\n" \
	"mov %edx, %eax\n" \
	"pop %r15\npop %r14\npop %r13\npop %r12\npop %rbp\npop %rbx\nret\n"

#define LOW "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15"
#define ALL LOW ",16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31"
__asm__(".text\n"
	FP_ROUND("fp_round_sse",
		".irp n," LOW "\nmovups 64*\\n(%rdi), %xmm\\n\n.endr\n",
		".irp n," LOW "\nmovups %xmm\\n, 64*\\n(%rsi)\n.endr\n")
	FP_ROUND("fp_round_avx",
		".irp n," LOW "\nvmovups 64*\\n(%rdi), %ymm\\n\n.endr\n",
		".irp n," LOW "\nvmovups %ymm\\n, 64*\\n(%rsi)\n.endr\nvzeroupper\n")
	FP_ROUND("fp_round_avx512",
		".irp n," ALL "\nvmovups 64*\\n(%rdi), %zmm\\n\n.endr\nkmovw (%rdi), %k5\n",
		".irp n," ALL "\nvmovups %zmm\\n, 64*\\n(%rsi)\n.endr\nkmovw %k5, 2056(%rsi)\nvzeroupper\n"));

static void *fp_worker(void *arg)
{
	static const double pi = 3.14159265358979323846;
	static const int width[3] = {16, 32, 64};
	int kind = __builtin_cpu_supports("avx512f") ? 2 : __builtin_cpu_supports("avx") ? 1 : 0;
	uint8_t in[2048], out[2064];
	stack_t stack;
	make_teb();
	own_signals(&stack);
	for (unsigned turn = 0;; turn++) {
		for (size_t i = 0; i < sizeof in; i++)
			in[i] = (uint8_t)(i * 7 + turn);
		memset(out, 0, sizeof out);
		unsigned bad = (kind == 2 ? fp_round_avx512 : kind == 1 ? fp_round_avx : fp_round_sse)(in, out, 20000);
		double x87;
		memcpy(&x87, out + 2048, 8);
		if (bad)
			note_fault(FAULT, "integer registers or red zone", bad, 0);
		if (x87 != pi)
			note_fault(FAULT, "x87 register", (long)(x87 * 1000), (long)(pi * 1000));
		if (kind == 2 && memcmp(in, out + 2056, 2))
			note_fault(FAULT, "mask register", out[2056], in[0]);
		for (int n = 0; n < (kind == 2 ? 32 : 16); n++)
			if (memcmp(in + 64 * n, out + 64 * n, width[kind]))
				note_fault(FAULT, "vector register", n, -1);
		check_signals(&stack);
		__atomic_fetch_add(&shared->fprounds, 1, __ATOMIC_RELAXED);
	}
	return NULL;
}

static int64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void *sleeper(void *arg)
{
	int kind = (int)(long)arg % 4, word = 0;
	long ns = 20000000;
	stack_t stack;
	make_teb();
	own_signals(&stack);
	for (;;) {
		struct timespec t = {0, ns};
		int64_t from = now();
		long r;
		errno = 0;
		switch (kind) {
		case 0: r = clock_nanosleep(CLOCK_MONOTONIC, 0, &t, NULL); break;
		case 1: r = syscall(SYS_nanosleep, &t, NULL); break;
		case 2: r = poll(NULL, 0, (int)(ns / 1000000)); break;
		default: r = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &t, NULL, 0) == -1 && errno == ETIMEDOUT ? 0 : errno ? errno : -1; break;
		}
		int64_t took = now() - from;
		static const char *name[4] = {"clock_nanosleep", "nanosleep", "poll", "futex with time-out"};
		if (r)
			note_fault(FAULT, name[kind], errno ? errno : r, 0);
		else if (took < ns - 1000000)
			note_fault(FAULT, name[kind], took, ns);
		if (took > ns + 1000000000)
			__atomic_fetch_add(&shared->lates, 1, __ATOMIC_RELAXED);
		check_signals(&stack);
		__atomic_fetch_add(&shared->sleeps, 1, __ATOMIC_RELAXED);
		call_once();
	}
	return NULL;
}

struct feed {
	int kind, r, w;
	volatile int word;
};
static struct feed *feeds;

static void *blocker(void *arg)
{
	struct feed *f = arg;
	uint8_t next = 0, got;
	stack_t stack;
	make_teb();
	own_signals(&stack);
	for (;; next++) {
		long r;
		errno = 0;
		if (f->kind == 2) { /* until the word moves on */
			int seen = next;
			while ((uint8_t)f->word == next) {
				seen = f->word;
				if ((uint8_t)seen == next && syscall(SYS_futex, &f->word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0) && errno != EAGAIN)
					note_fault(FAULT, "futex", errno, 0);
			}
		} else {
			if (f->kind == 1) {
				struct pollfd p = {f->r, POLLIN, 0};
				if ((r = poll(&p, 1, -1)) != 1)
					note_fault(FAULT, "poll", errno, 0);
			}
			if ((r = read(f->r, &got, 1)) != 1)
				note_fault(FAULT, "read", r < 0 ? errno : r, 1);
			else if (got != next)
				note_fault(FAULT, "byte read", got, next);
		}
		check_signals(&stack);
		__atomic_fetch_add(&shared->reads, 1, __ATOMIC_RELAXED);
		call_once();
	}
	return NULL;
}

static void *feeder(void *arg)
{
	make_teb();
	for (uint8_t n = 0;; n++) {
		nap(50000);
		for (int i = 0; i < opt.block; i++)
			if (feeds[i].kind == 2) {
				__atomic_store_n(&feeds[i].word, (uint8_t)(n + 1), __ATOMIC_SEQ_CST);
				syscall(SYS_futex, &feeds[i].word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
			} else if (write(feeds[i].w, &n, 1) != 1)
				note_fault(FAULT, "write", errno, 1);
		/* A reader of the word must have seen it before it moves on again: all are given 50 ms. */
	}
	return NULL;
}

static void *short_lived(void *arg)
{
	make_teb();
	call_once();
	return NULL;
}

static void *churner(void *arg)
{
	make_teb();
	for (;;) {
		pthread_t t[2];
		int n = 0;
		for (; n < 2; n++)
			if (pthread_create(&t[n], NULL, short_lived, NULL))
				break;
		while (n-- > 0)
			pthread_join(t[n], NULL);
		call_once();
	}
	return NULL;
}

static int in_image(uint64_t pc)
{
	return main_module && pc >= (uint64_t)main_module->base && pc < (uint64_t)main_module->base + main_module->size;
}

/* Stays on the signal stack once the signal found the thread inside the image. */
static void on_signal(int sig, siginfo_t *info, void *context)
{
	ucontext_t *u = context;
	if (!in_image((uint64_t)u->uc_mcontext.gregs[REG_RIP]))
		return;
	shared->alt_sp = (uint64_t)u->uc_mcontext.gregs[REG_RSP];
	shared->alt_pc = (uint64_t)u->uc_mcontext.gregs[REG_RIP];
	__atomic_store_n(&shared->alt_tid, (uint64_t)syscall(SYS_gettid), __ATOMIC_SEQ_CST);
	for (;;)
		nap(20000);
}

static volatile int alt_tid;

static void *alt_worker(void *arg)
{
	stack_t s = {.ss_sp = malloc(64 << 10), .ss_size = 64 << 10};
	make_teb();
	sigaltstack(&s, NULL);
	alt_tid = (int)syscall(SYS_gettid);
	for (;;)
		called(opt.arg);
	return NULL;
}

/* Sends the signal until it hits inside the image; the thread then stays there. */
int stand_on_signal_stack(void)
{
	struct sigaction a = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK};
	sigaction(SIGUSR1, &a, NULL);
	for (int i = 0; i < 20000 && !shared->alt_tid; i++) {
		if (alt_tid)
			syscall(SYS_tgkill, getpid(), alt_tid, SIGUSR1);
		nap(300);
	}
	return shared->alt_tid != 0;
}

/* The receiver computes and takes queued signals, each with a value. */
static volatile int receiver_tid;

static void on_queued(int sig, siginfo_t *info, void *context)
{
	if (info->si_code != SI_QUEUE)
		note_fault(FAULT, "signal information: code", info->si_code, SI_QUEUE);
	__atomic_fetch_add(&shared->signal_sum, (uint64_t)info->si_value.sival_int, __ATOMIC_RELAXED);
	__atomic_fetch_add(&shared->signals, 1, __ATOMIC_RELAXED);
}

static void *receiver(void *arg)
{
	make_teb();
	receiver_tid = (int)syscall(SYS_gettid);
	for (;;)
		call_once();
	return NULL;
}

int start_receiver(void)
{
	struct sigaction a = {.sa_sigaction = on_queued, .sa_flags = SA_SIGINFO | SA_RESTART};
	sigaction(SIGRTMIN, &a, NULL);
	shared->threads++;
	new_thread(receiver, NULL);
	while (!receiver_tid)
		nap(1000);
	return receiver_tid;
}

static void many(int n, void *(*f)(void *))
{
	for (int i = 0; i < n; i++)
		new_thread(f, (void *)(long)i);
	shared->threads += (uint64_t)n;
}

void start_workers(void)
{
	paused = inside = alt_tid = 0; /* a forked child has none of its parent's threads */
	many(opt.spin, spinner);
	many(opt.fp, fp_worker);
	many(opt.sleep, sleeper);
	many(opt.churn, churner);
	if (opt.block) {
		feeds = calloc((size_t)opt.block, sizeof *feeds);
		for (int i = 0; i < opt.block; i++) {
			int p[2];
			if (!feeds || pipe2(p, O_CLOEXEC))
				die("pipe", NULL);
			feeds[i].kind = i % 3, feeds[i].r = p[0], feeds[i].w = p[1];
			new_thread(blocker, &feeds[i]);
		}
		new_thread(feeder, NULL);
		shared->threads += (uint64_t)opt.block + 1;
	}
	if (opt.wait)
		start_waiters();
	if (opt.altstack) {
		many(1, alt_worker);
		if (!stand_on_signal_stack())
			die("no signal found the thread inside the image", "altstack");
	}
}
