/* A Windows program whose code the win32 backend changes in tests. Needs mingw only.

     winhost --shared=FILE [--spin=N] [--block=N] [--sleep=N] [--regs=N] [--churn=N]
     winhost --trace=PID     a debugger on PID until its stdin ends

   Its threads call answer() all the time and count every value that is neither
   42 nor 43; those that block or sleep check their own waits. It prints
   "ready PID" and answers one line for each line read, "ok ..." or "error ...".
   It ends when its input does. */
#include "winhost.h"

struct block *shared;
int old_value = 42, new_value = 43;
static char scratch[64];

/* The code: a number in an instruction, and enough bytes behind it. */
__asm__(".text\n.p2align 6\n.globl answer\nanswer:\n"
	"movl $42, %eax\nret\n.fill 58, 1, 0x90\n");

void die(const char *what, const char *name)
{
	fprintf(stderr, "winhost: %s: %s (error %lu)\n", what, name, GetLastError());
	exit(3);
}

void note(int kind, const char *what, long long got, long long want)
{
	if (__atomic_fetch_add(kind == WRONG ? &shared->wrong : &shared->faults, 1, __ATOMIC_RELAXED) == 0)
		snprintf((char *)shared->example, sizeof shared->example, "%s: got %lld, want %lld", what, got, want);
}

void new_thread(LPTHREAD_START_ROUTINE f, void *arg)
{
	HANDLE h = CreateThread(NULL, 256 << 10, f, arg, STACK_SIZE_PARAM_IS_A_RESERVATION, NULL);
	if (!h)
		die("cannot start", "thread");
	CloseHandle(h);
}

static void share(const char *file)
{
	HANDLE f = CreateFileA(file, GENERIC_READ | GENERIC_WRITE, FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE, NULL, OPEN_EXISTING, 0, NULL);
	HANDLE m = f == INVALID_HANDLE_VALUE ? NULL : CreateFileMappingA(f, NULL, PAGE_READWRITE, 0, sizeof *shared, NULL);
	shared = m ? MapViewOfFile(m, FILE_MAP_WRITE, 0, 0, sizeof *shared) : NULL;
	if (!shared)
		die("cannot share", file);
	CloseHandle(m);
	CloseHandle(f);
	shared->entry = (uint64_t)answer;
	shared->scratch = (uint64_t)scratch;
}

static void c_value(char *arg) { printf("ok %d\n", call_once()); }

static void c_load(char *arg)
{
	uint8_t *h = (uint8_t *)LoadLibraryA(arg);
	if (!h) {
		printf("error cannot load %s: %lu\n", arg, GetLastError());
		return;
	}
	IMAGE_NT_HEADERS *nt = (IMAGE_NT_HEADERS *)(h + ((IMAGE_DOS_HEADER *)h)->e_lfanew);
	printf("ok %llx %lx\n", (unsigned long long)h, nt->OptionalHeader.SizeOfImage);
}

static void c_unload(char *arg)
{
	printf(FreeLibrary((HMODULE)strtoull(arg, NULL, 16)) ? "ok\n" : "error\n");
}

/* run BASE NAME: what an export int f(int) of a loaded library returns for 0. */
static void c_run(char *arg)
{
	char *name;
	HMODULE m = (HMODULE)strtoull(arg, &name, 16);
	int (*f)(int) = *name ? (int (*)(int))GetProcAddress(m, name + 1) : NULL;
	if (f)
		printf("ok %d\n", f(0));
	else
		printf("error no export\n");
}

/* lookup ADDRESS: the unwind record the system finds for it. */
static void c_lookup(char *arg)
{
	DWORD64 base = 0, at = strtoull(arg, NULL, 16);
	RUNTIME_FUNCTION *f = RtlLookupFunctionEntry(at, &base, NULL);
	if (f)
		printf("ok %llx %lx %lx\n", (unsigned long long)base, f->BeginAddress, f->EndAddress);
	else
		printf("ok none\n");
}

/* proc NAME: where a function of ntdll is, as this process knows it. */
static void c_proc(char *arg)
{
	printf("ok %llx\n", (unsigned long long)GetProcAddress(GetModuleHandleA("ntdll.dll"), arg));
}

/* An own thread that the program itself holds: its count is none of ours. */
static DWORD WINAPI idle(void *arg)
{
	for (;;)
		Sleep(1000);
	return 0;
}

static void c_suspended(char *arg)
{
	DWORD id;
	HANDLE h = CreateThread(NULL, 64 << 10, idle, NULL, CREATE_SUSPENDED | STACK_SIZE_PARAM_IS_A_RESERVATION, &id);
	printf(h ? "ok %lu\n" : "error %lu\n", h ? id : GetLastError());
}

static void c_quit(char *arg) { exit(atoi(arg)); }

static LONG CALLBACK unhandled(EXCEPTION_POINTERS *x) { return EXCEPTION_EXECUTE_HANDLER; }

/* An access violation that nobody handles: the system ends us. A debugger that
   it starts before would keep our output open. */
static void c_crash(char *arg)
{
	SetUnhandledExceptionFilter(unhandled);
	*(volatile int *)8 = 0;
}

static const struct command {
	const char *name;
	void (*run)(char *arg);
} commands[] = {
	{"value", c_value}, {"load", c_load}, {"unload", c_unload}, {"run", c_run}, {"lookup", c_lookup},
	{"proc", c_proc}, {"suspended", c_suspended}, {"quit", c_quit}, {"crash", c_crash},
};

static void obey(char *line)
{
	line[strcspn(line, "\r\n")] = 0;
	char *arg = line + strcspn(line, " ");
	if (*arg)
		*arg++ = 0;
	for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
		if (strcmp(line, commands[i].name) == 0) {
			commands[i].run(arg);
			return;
		}
	printf("error no command %s\n", line);
}

static const char *value_of(const char *arg, const char *name)
{
	size_t n = strlen(name);
	return strncmp(arg, name, n) == 0 && arg[n] == '=' ? arg + n + 1 : NULL;
}

int main(int c, char **v)
{
	const char *file = NULL;
	int spin = 1, block = 0, sleep = 0, regs = 0, churn = 0;
	setvbuf(stdout, NULL, _IONBF, 0);
	for (int i = 1; i < c; i++) {
		const char *x;
		if ((x = value_of(v[i], "--shared"))) file = x;
		else if ((x = value_of(v[i], "--spin"))) spin = atoi(x);
		else if ((x = value_of(v[i], "--block"))) block = atoi(x);
		else if ((x = value_of(v[i], "--sleep"))) sleep = atoi(x);
		else if ((x = value_of(v[i], "--regs"))) regs = atoi(x);
		else if ((x = value_of(v[i], "--churn"))) churn = atoi(x);
		else if ((x = value_of(v[i], "--trace"))) trace((DWORD)strtoul(x, NULL, 10));
		else die("unknown option", v[i]);
	}
	if (!file)
		die("needed", "--shared=FILE");
	share(file);
	start_workers(spin, block, sleep, regs, churn);
	printf("ready %lu\n", GetCurrentProcessId());
	for (char line[1024]; fgets(line, sizeof line, stdin);)
		obey(line);
	return 0;
}
