/* A Windows program for tests: it loads a DLL, calls one of its functions from
   many threads and checks every answer, and answers questions on its standard
   input, one line each.

     winapp.exe DLL FUNCTION SPIN SLEEP BLOCK ALLOWED...

   x86_64-w64-mingw32-gcc -O2 -o winapp.exe winapp.c */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <windows.h>

typedef int (*function)(int);

static HMODULE module;
static volatile function called;
static int allowed[16], allows;
static int deadly = -1; /* an answer at which it crashes */
static volatile LONG64 calls, wrong, faults, sleeps, waits;
static HANDLE bell; /* auto-reset, rung every 50 ms */
static volatile LONG64 work[256], seen[256]; /* of each thread; what was told last */
static int threads;

static int call(void)
{
	int v = called(0);
	if (v == deadly)
		*(volatile int *)8 = v;
	InterlockedIncrement64(&calls);
	for (int i = 0; i < allows; i++)
		if (v == allowed[i])
			return v;
	InterlockedIncrement64(&wrong);
	return v;
}

static DWORD WINAPI __attribute__((noreturn)) spin(void *arg)
{
	for (unsigned i = 1;; i++) {
		call();
		++*(volatile LONG64 *)arg;
		if (i % 4096 == 0)
			Sleep(0); /* test machines have two processors */
	}
}

/* Milliseconds. The tick count is no good: under Wine it is brought up to date
   by a server that may be starved. */
static double now(void)
{
	LARGE_INTEGER c, f;
	QueryPerformanceCounter(&c);
	QueryPerformanceFrequency(&f);
	return c.QuadPart * 1000.0 / f.QuadPart;
}

/* A sleep that ends early was cut short by somebody. */
static DWORD WINAPI __attribute__((noreturn)) sleeper(void *arg)
{
	for (;;) {
		double from = now();
		Sleep(50);
		if (now() - from < 45)
			InterlockedIncrement64(&faults);
		InterlockedIncrement64(&sleeps);
		++*(volatile LONG64 *)arg;
		call();
	}
}

static DWORD WINAPI __attribute__((noreturn)) blocked(void *arg)
{
	for (;;) {
		if (WaitForSingleObject(bell, 60000) != WAIT_OBJECT_0)
			InterlockedIncrement64(&faults);
		InterlockedIncrement64(&waits);
		++*(volatile LONG64 *)arg;
		call();
	}
}

static DWORD WINAPI __attribute__((noreturn)) ringer(void *arg)
{
	for (;;) {
		Sleep(50);
		SetEvent(bell);
		++*(volatile LONG64 *)arg;
	}
}

static void start(LPTHREAD_START_ROUTINE f)
{
	HANDLE h = threads < 256 ? CreateThread(NULL, 1 << 20, f, (void *)&work[threads++], 0, NULL) : NULL;
	if (!h) {
		printf("error CreateThread %lu\n", GetLastError());
		exit(1);
	}
	CloseHandle(h);
}

/* The system ends us at once, with the exception's code: a debugger that it
   starts else would keep our output open. */
static LONG CALLBACK crashed(EXCEPTION_POINTERS *x)
{
	printf("error exception %lx at %p\n", x->ExceptionRecord->ExceptionCode, x->ExceptionRecord->ExceptionAddress);
	return EXCEPTION_EXECUTE_HANDLER;
}

int main(int argc, char **argv)
{
	char line[600], name[512];
	int x;
	setvbuf(stdout, NULL, _IONBF, 0);
	SetUnhandledExceptionFilter(crashed);
	if (argc < 7)
		return 2;
	if (getenv("WINAPP_DEADLY"))
		deadly = atoi(getenv("WINAPP_DEADLY"));
	/* Somebody else is where the DLL wants to be: it comes to another place. */
	if (getenv("WINAPP_ELSEWHERE") && !VirtualAlloc((void *)0x180000000, 1 << 16, MEM_RESERVE, PAGE_NOACCESS))
		return 3;
	module = LoadLibraryA(argv[1]);
	if (!module) {
		printf("error LoadLibrary %lu\n", GetLastError());
		return 1;
	}
	called = (function)(void *)GetProcAddress(module, argv[2]);
	if (!called) {
		printf("error GetProcAddress %lu\n", GetLastError());
		return 1;
	}
	for (int i = 6; i < argc && allows < 16; i++)
		allowed[allows++] = atoi(argv[i]);
	bell = CreateEventA(NULL, FALSE, FALSE, NULL);
	for (int i = atoi(argv[3]); i > 0; i--)
		start(spin);
	for (int i = atoi(argv[4]); i > 0; i--)
		start(sleeper);
	for (int i = atoi(argv[5]); i > 0; i--)
		start(blocked);
	start(ringer);
	printf("ready %lu %p\n", GetCurrentProcessId(), (void *)module);
	while (fgets(line, sizeof line, stdin)) {
		if (sscanf(line, "call %511s %d", name, &x) == 2) {
			function f = (function)(void *)GetProcAddress(module, name);
			f ? printf("%d\n", f(x)) : printf("error GetProcAddress %lu\n", GetLastError());
		} else if (!strncmp(line, "state", 5)) {
			int v = call(), idle = 0; /* threads that did nothing since the last time */
			for (int i = 0; i < threads; i++) {
				LONG64 n = work[i];
				idle += n == seen[i];
				seen[i] = n;
			}
			printf("%d calls %lld wrong %lld faults %lld sleeps %lld waits %lld idle %d of %d\n", v, calls, wrong, faults, sleeps, waits, idle, threads);
		} else if (sscanf(line, "load %511s", name) == 1) {
			HMODULE h = LoadLibraryA(name); /* late, by hand */
			printf(h ? "%p\n" : "error LoadLibrary %p\n", (void *)h);
		} else
			printf("error unknown command\n");
	}
	return 0;
}
