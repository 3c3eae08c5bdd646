/* The threads of the victim: they run the code all the time and check themselves. */
#include "winhost.h"

int call_once(void)
{
	int v = answer(0);
	__atomic_fetch_add(&shared->calls, 1, __ATOMIC_RELAXED);
	shared->value = v;
	if (v != old_value && v != new_value)
		note(WRONG, "value", v, old_value);
	return v;
}

static DWORD WINAPI spinner(void *arg)
{
	for (unsigned i = 1;; i++) {
		call_once();
		if (i % 4096 == 0)
			SwitchToThread(); /* test machines have two processors */
	}
	return 0;
}

/* Milliseconds by the performance counter: the tick count may stand still for
   longer than a tick where the system is busy. */
static long long now(void)
{
	LARGE_INTEGER t, f;
	QueryPerformanceCounter(&t);
	QueryPerformanceFrequency(&f);
	return t.QuadPart / (f.QuadPart / 1000);
}

/* Two ticks (of 16 ms) are allowed for: a Sleep that ends earlier was cut short. */
static DWORD WINAPI sleeper(void *arg)
{
	const DWORD ms = 100;
	for (;;) {
		long long from = now();
		Sleep(ms);
		long long took = now() - from;
		if (took + 32 < ms)
			note(FAULT, "Sleep", took, ms);
		__atomic_fetch_add(&shared->sleeps, 1, __ATOMIC_RELAXED);
		call_once();
	}
	return 0;
}

/* What one blocked thread waits for: a byte or an event, in turn by its number. */
struct feed {
	int kind;
	HANDLE r, w, event, taken;
	volatile LONG word;
};

static DWORD WINAPI blocker(void *arg)
{
	struct feed *f = arg;
	for (uint8_t next = 0;; next++) {
		uint8_t got = 0;
		DWORD n = 0;
		if (f->kind == 0) {
			if (!ReadFile(f->r, &got, 1, &n, NULL) || n != 1)
				note(FAULT, "ReadFile", (long long)GetLastError(), 0);
			else if (got != next)
				note(FAULT, "byte read", got, next);
		} else {
			DWORD r = WaitForSingleObject(f->event, INFINITE);
			if (r != WAIT_OBJECT_0)
				note(FAULT, "WaitForSingleObject", r, WAIT_OBJECT_0);
			else if ((uint8_t)f->word != next)
				note(FAULT, "number at the event", f->word, next);
			SetEvent(f->taken);
		}
		__atomic_fetch_add(&shared->reads, 1, __ATOMIC_RELAXED);
		call_once();
	}
	return 0;
}

struct feeds {
	int n;
	struct feed *f;
};

static DWORD WINAPI feeder(void *arg)
{
	struct feeds *all = arg;
	for (uint8_t n = 0;; n++) {
		Sleep(50);
		for (int i = 0; i < all->n; i++) {
			struct feed *f = &all->f[i];
			DWORD wrote;
			if (f->kind == 0) {
				if (!WriteFile(f->w, &n, 1, &wrote, NULL) || wrote != 1)
					note(FAULT, "WriteFile", (long long)GetLastError(), 0);
				continue;
			}
			WaitForSingleObject(f->taken, INFINITE);
			f->word = n;
			SetEvent(f->event);
		}
	}
	return 0;
}

/* regs_round: fills the registers that a call keeps or loses, counts down, and
   counts those that changed. */
unsigned regs_round(long long rounds, const void *in, void *out);
#define EACH ".irp r,rax,rbx,rbp,rsi,rdi,r9,r10,r11,r12,r13,r14,r15\n"
#define XMM ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
__asm__(".text\n.p2align 4\n.globl regs_round\nregs_round:\n"
	"push %rbx\npush %rbp\npush %rsi\npush %rdi\npush %r12\npush %r13\npush %r14\npush %r15\n"
	"sub $168, %rsp\n"
	".irp n,6,7,8,9,10,11,12,13,14,15\nmovups %xmm\\n, 16*(\\n-6)(%rsp)\n.endr\n"
	XMM "movups 16*\\n(%rdx), %xmm\\n\n.endr\n"
	"push %r8\n"
	EACH "mov $0x1234567, %\\r\n.endr\n"
	"1: dec %rcx\njnz 1b\n"
	EACH "cmp $0x1234567, %\\r\nje 2f\ninc %rcx\n2:\n.endr\n"
	"pop %r8\n"
	XMM "movups %xmm\\n, 16*\\n(%r8)\n.endr\n"
	".irp n,6,7,8,9,10,11,12,13,14,15\nmovups 16*(\\n-6)(%rsp), %xmm\\n\n.endr\n"
	"mov %ecx, %eax\n"
	"add $168, %rsp\n"
	"pop %r15\npop %r14\npop %r13\npop %r12\npop %rdi\npop %rsi\npop %rbp\npop %rbx\nret\n");

static DWORD WINAPI registers(void *arg)
{
	uint8_t in[256], out[256];
	for (unsigned turn = 0;; turn++) {
		for (size_t i = 0; i < sizeof in; i++)
			in[i] = (uint8_t)(i * 7 + turn);
		memset(out, 0, sizeof out);
		unsigned bad = regs_round(20000, in, out);
		if (bad)
			note(FAULT, "integer registers", bad, 0);
		if (memcmp(in, out, sizeof in))
			note(FAULT, "vector registers", 1, 0);
		__atomic_fetch_add(&shared->rounds, 1, __ATOMIC_RELAXED);
	}
	return 0;
}

static DWORD WINAPI short_lived(void *arg)
{
	call_once();
	return 0;
}

static DWORD WINAPI churner(void *arg)
{
	for (;;) {
		HANDLE h[2];
		DWORD n = 0;
		for (; n < 2; n++)
			if (!(h[n] = CreateThread(NULL, 64 << 10, short_lived, NULL, STACK_SIZE_PARAM_IS_A_RESERVATION, NULL)))
				break;
		WaitForMultipleObjects(n, h, TRUE, INFINITE);
		while (n-- > 0)
			CloseHandle(h[n]);
		call_once();
	}
	return 0;
}

static void many(int n, LPTHREAD_START_ROUTINE f)
{
	for (int i = 0; i < n; i++)
		new_thread(f, NULL);
}

void start_workers(int spin, int block, int sleep, int regs, int churn)
{
	many(spin, spinner);
	many(sleep, sleeper);
	many(regs, registers);
	many(churn, churner);
	if (!block)
		return;
	static struct feeds all;
	all.n = block;
	all.f = calloc((size_t)block, sizeof *all.f);
	for (int i = 0; i < block; i++) {
		struct feed *f = &all.f[i];
		f->kind = i % 2;
		f->event = CreateEventA(NULL, FALSE, FALSE, NULL);
		f->taken = CreateEventA(NULL, FALSE, TRUE, NULL);
		if (!f->event || !f->taken || !CreatePipe(&f->r, &f->w, NULL, 0))
			die("cannot make", "pipe");
		new_thread(blocker, f);
	}
	new_thread(feeder, &all);
}
