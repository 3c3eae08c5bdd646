/* The control protocol, the processes it makes, and the other tracer. */
#define _GNU_SOURCE
#include "host.h"

char **arguments;
static char program[4096]; /* looked up early: a dead main thread has no /proc/self/exe */
static int in = 0, out = 1; /* a forked child talks to its parent instead */
static int leader_pipe[2];
static struct child { int fd, pid; } children[MAX_CHILDREN];
static int child_count;
static struct module *modules[MAX_MODULES];

static void say(const char *format, ...)
{
	char line[512];
	va_list a;
	va_start(a, format);
	int n = vsnprintf(line, sizeof line - 1, format, a);
	va_end(a);
	if (n > (int)sizeof line - 2)
		n = (int)sizeof line - 2;
	line[n++] = '\n';
	if (write(out, line, (size_t)n) != n)
		_exit(0);
}

/* Byte by byte: what comes after the line belongs to whoever execs. */
static int read_line(int fd, char *line, size_t size)
{
	size_t n = 0;
	char c;
	while (n < size - 1) {
		ssize_t r = read(fd, &c, 1);
		if (r < 0 && errno == EINTR)
			continue;
		if (r != 1)
			return 0;
		if (c == '\n')
			break;
		line[n++] = c;
	}
	line[n] = 0;
	return 1;
}

static void c_value(char *arg) { say("ok value %d", call_once()); }

static void c_stats(char *arg)
{
	say("ok calls %lu wrong %lu faults %lu", (unsigned long)shared->calls, (unsigned long)shared->wrong, (unsigned long)shared->faults);
}

static void c_fork(char *arg)
{
	int s[2];
	if (child_count == MAX_CHILDREN || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, s)) {
		say("error no more children");
		return;
	}
	pid_t pid = fork();
	if (pid == 0) {
		for (int i = 0; i < child_count; i++)
			close(children[i].fd);
		child_count = 0;
		close(s[0]);
		if (in != 0)
			close(in);
		/* Our parent's output ends with our parent. */
		int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
		dup2(null, 1);
		close(null);
		in = out = s[1];
		uint64_t base = shared->base, entry = shared->entry;
		take_block();
		shared->base = base, shared->entry = entry;
		shared->threads = 1;
		start_workers();
		say("ready %d %lx %lu", getpid(), (unsigned long)base, (unsigned long)shared->index);
		return;
	}
	close(s[1]);
	char line[256];
	children[child_count].fd = s[0];
	children[child_count].pid = pid;
	if (pid < 0 || !read_line(s[0], line, sizeof line)) {
		say("error fork");
		return;
	}
	say("ok fork %d %s", child_count++, line);
}

/* child N COMMAND: the child's answer is ours. */
static void c_child(char *arg)
{
	char *rest;
	long n = strtol(arg, &rest, 10);
	char line[512];
	if (rest == arg || n < 0 || n >= child_count || *rest != ' ') {
		say("error no such child");
		return;
	}
	dprintf(children[n].fd, "%s\n", rest + 1);
	if (read_line(children[n].fd, line, sizeof line)) {
		say("%s", line);
		return;
	}
	waitpid(children[n].pid, NULL, 0);
	say("ok over");
}

static void c_exec(char *arg)
{
	execv(program, arguments);
	say("error exec: %s", strerror(errno));
}

/* A child that uses our memory: one that its creator waits for (vfork), or one beside us. */
static int sharer_pipe[2], sharer_pid;
static volatile int sharer_is_child; /* set by the child, which shares our memory */

static int sharer_main(void *arg)
{
	char c;
	syscall(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
	__atomic_store_n(&sharer_is_child, (int)syscall(SYS_getpid), __ATOMIC_SEQ_CST);
	syscall(SYS_close, sharer_pipe[1]);
	syscall(SYS_read, sharer_pipe[0], &c, 1);
	syscall(SYS_exit, 0);
	return 0;
}

static void *sharer_thread(void *flags)
{
	static char stack[64 << 10] __attribute__((aligned(16)));
	make_teb();
	sharer_pid = clone(sharer_main, stack + sizeof stack, (int)(long)flags | SIGCHLD, NULL);
	if (sharer_pid < 0)
		die("clone", NULL);
	waitpid(sharer_pid, NULL, 0);
	sharer_is_child = 0;
	__atomic_fetch_sub(&shared->threads, 1, __ATOMIC_SEQ_CST);
	return NULL;
}

static void share_memory(int flags, const char *name)
{
	if (sharer_is_child || pipe2(sharer_pipe, O_CLOEXEC)) {
		say("error one at a time");
		return;
	}
	__atomic_fetch_add(&shared->threads, 1, __ATOMIC_SEQ_CST);
	new_thread(sharer_thread, (void *)(long)flags);
	while (!__atomic_load_n(&sharer_is_child, __ATOMIC_SEQ_CST))
		usleep(1000);
	say("ok %s %d", name, sharer_is_child);
}

static void c_vfork(char *arg) { share_memory(CLONE_VM | CLONE_VFORK, "vfork"); }
static void c_clone_vm(char *arg) { share_memory(CLONE_VM, "clone-vm"); }

static void c_unshare(char *arg)
{
	if (!sharer_is_child) {
		say("error nobody shares");
		return;
	}
	close(sharer_pipe[1]);
	close(sharer_pipe[0]);
	while (__atomic_load_n(&sharer_is_child, __ATOMIC_SEQ_CST))
		usleep(1000);
	say("ok");
}

static struct module **module_at(uint64_t base)
{
	for (int i = 0; i < MAX_MODULES; i++)
		if (modules[i] && (uint64_t)modules[i]->base == base)
			return &modules[i];
	return NULL;
}

/* load FILE [BASE] */
static void c_load(char *arg)
{
	char *base = strrchr(arg, ' ');
	if (base)
		*base++ = 0;
	for (int i = 0; i < MAX_MODULES; i++)
		if (!modules[i]) {
			modules[i] = load_module(arg, base ? strtoull(base, NULL, 16) : 0);
			say("ok load %lx %lx", (unsigned long)modules[i]->base, (unsigned long)modules[i]->size);
			return;
		}
	say("error too many modules");
}

/* unload [BASE]: of the main image without BASE; the workers then wait for its return. */
static void c_unload(char *arg)
{
	if (*arg) {
		struct module **m = module_at(strtoull(arg, NULL, 16));
		if (!m) {
			say("error no such module");
			return;
		}
		unload_module(*m);
		*m = NULL;
	} else if (main_module) {
		pause_calls(1);
		unload_module(main_module);
		main_module = NULL;
	}
	say("ok");
}

/* reload [FILE]: the main image, or another one in its place, at the base it had. */
static void c_reload(char *arg)
{
	const char *file = *arg ? arg : opt.dll;
	if (main_module) {
		pause_calls(1);
		unload_module(main_module);
	}
	main_module = load_module(file, shared->base);
	called = find_export(main_module, opt.call);
	if (!called)
		die("no such export", opt.call);
	shared->entry = (uint64_t)called;
	pause_calls(0);
	say("ok reload %lx", (unsigned long)main_module->base);
}

static void c_seccomp(char *arg)
{
	struct sock_filter f[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
	struct sock_fprog p = {1, f};
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &p))
		say("error seccomp: %s", strerror(errno));
	else
		say("ok");
}

#ifndef PR_SET_MDWE
#define PR_SET_MDWE 65
#endif
static void c_mdwe(char *arg)
{
	if (prctl(PR_SET_MDWE, 1 /* PR_MDWE_REFUSE_EXEC_GAIN */, 0, 0, 0))
		say("error mdwe: %s", strerror(errno));
	else
		say("ok");
}

/* Every call of this thread is asked about in a byte that always says "allow". */
static void c_dispatch(char *arg)
{
	static char selector; /* SYSCALL_DISPATCH_FILTER_ALLOW */
	if (prctl(59 /* PR_SET_SYSCALL_USER_DISPATCH */, 1, 0, 0, &selector))
		say("error dispatch: %s", strerror(errno));
	else
		say("ok");
}

static void c_stop_leader(char *arg)
{
	if (write(leader_pipe[1], "x", 1) != 1)
		say("error no leader");
	char path[64], state[512] = "";
	for (int i = 0; i < 5000; i++) { /* until it is a zombie for everybody */
		snprintf(path, sizeof path, "/proc/self/task/%d/stat", getpid());
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		ssize_t n = read(fd, state, sizeof state - 1);
		close(fd);
		if (n > 0 && strstr(state, ") Z"))
			break;
		usleep(1000);
	}
	shared->threads--;
	say("ok");
}

static int __attribute__((ms_abi)) foreign(int x) { return 7777; }

static uint8_t unhooked[14];

/* hook NAME: as another product would, a long jump over the entry of an export. */
static void c_hook(char *arg)
{
	uint8_t *f = main_module ? (uint8_t *)find_export(main_module, arg) : NULL;
	if (!f) {
		say("error no such export");
		return;
	}
	uint8_t jump[14] = {0xff, 0x25, 0, 0, 0, 0}; /* jmp *0(%rip) */
	void *to = foreign;
	memcpy(jump + 6, &to, 8);
	uint8_t *page = (uint8_t *)((uint64_t)f & ~4095ull);
	memcpy(unhooked, f, sizeof unhooked);
	pause_calls(1);
	if (mprotect(page, 8192, PROT_READ | PROT_WRITE | PROT_EXEC) && mprotect(page, 4096, PROT_READ | PROT_WRITE | PROT_EXEC))
		die("mprotect", NULL);
	memcpy(f, jump, sizeof jump);
	if (mprotect(page, 4096, PROT_READ | PROT_EXEC))
		die("mprotect", NULL);
	pause_calls(0);
	say("ok hook %lx", (unsigned long)f);
}

static void c_receiver(char *arg) { say("ok receiver %d %d", start_receiver(), SIGRTMIN); }

/* map FILE SIZE [ADDR]: read-only and private, in place of what is at ADDR. */
static void c_map(char *arg)
{
	char file[4096];
	uint64_t size = 0, at = 0;
	int fd;
	if (sscanf(arg, "%4095s %lx %lx", file, &size, &at) < 2 || (fd = open(file, O_RDONLY | O_CLOEXEC)) < 0) {
		say("error map: %s", strerror(errno));
		return;
	}
	void *p = mmap((void *)at, size, PROT_READ, MAP_PRIVATE | (at ? MAP_FIXED : 0), fd, 0);
	close(fd);
	say(p == MAP_FAILED ? "error map" : "ok map %lx", (unsigned long)p);
}

static void c_touch(char *arg) { say("ok touch %d", *(volatile uint8_t *)strtoull(arg, NULL, 16)); }

static void c_auxv(char *arg) { say("ok auxv %lx", getauxval(strtoul(arg, NULL, 10))); }

/* What the control thread would not come back from. */
static void *touches(void *at)
{
	return (void *)(long)*(volatile uint8_t *)at;
}

static void *maps(void *arg)
{
	nap(100000);
	mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return NULL;
}

static char *executed;

static void *execs(void *arg)
{
	char *none[] = {executed, NULL};
	execv(executed, none);
	return NULL;
}

/* beside exec FILE; beside hold ADDR: one thread touches, another one maps a little later. */
static void c_beside(char *arg)
{
	if (!strncmp(arg, "hold ", 5))
		new_thread(maps, NULL), new_thread(touches, (void *)strtoull(arg + 5, NULL, 16));
	else if (!strncmp(arg, "exec ", 5))
		executed = strdup(arg + 5), new_thread(execs, NULL);
	say("ok");
}

static void c_waiters(char *arg)
{
	char line[480];
	tell_waiters(line, sizeof line);
	say("ok waiters %s", line);
}

static void c_tid(char *arg) { say("ok tid %ld", syscall(SYS_gettid)); }

static void c_quit(char *arg)
{
	say("ok");
	_exit(0);
}

static const struct { const char *name; void (*f)(char *); } commands[] = {
	{"value", c_value},       /* the result of one more call */
	{"stats", c_stats},       /* counters; the shared block has more */
	{"fork", c_fork},         /* a child that is a host itself: "ok fork N ready PID BASE BLOCK" */
	{"child", c_child},       /* child N COMMAND: to child N; "ok over" when it has ended */
	{"exec", c_exec},         /* the same program anew, with the same arguments: "ready" again */
	{"vfork", c_vfork},       /* a thread waits for its vfork child until unshare */
	{"clone-vm", c_clone_vm}, /* a child process in our memory, until unshare */
	{"unshare", c_unshare},
	{"load", c_load},         /* load FILE [BASE]: one more image: "ok load BASE SIZE" */
	{"unload", c_unload},     /* unload [BASE] */
	{"reload", c_reload},     /* reload [FILE] */
	{"seccomp", c_seccomp},   /* a filter that allows all, on every thread */
	{"mdwe", c_mdwe},         /* no image can be loaded after that */
	{"dispatch", c_dispatch}, /* syscall user dispatch on the control thread */
	{"stop-leader", c_stop_leader},
	{"hook", c_hook},         /* hook NAME */
	{"receiver", c_receiver}, /* a thread that counts queued signals: "ok receiver TID SIGNAL" */
	{"waiters", c_waiters},   /* "ok waiters SIGNAL", and NAME TID EINTRS of each thread that waits */
	{"map", c_map},           /* map FILE SIZE [ADDR]: "ok map ADDR" */
	{"touch", c_touch},       /* touch ADDR: the byte there */
	{"beside", c_beside},     /* beside hold ADDR, or exec FILE: by other threads */
	{"auxv", c_auxv},         /* auxv N: getauxval(N) */
	{"tid", c_tid},           /* of the control thread */
	{"quit", c_quit},
};

void *control(void *unused)
{
	char line[8192];
	make_teb();
	say("ready %d %lx %lu", getpid(), (unsigned long)shared->base, (unsigned long)shared->index);
	while (read_line(in, line, sizeof line)) {
		char *arg = strchr(line, ' ');
		size_t i = 0;
		arg ? (void)(*arg++ = 0) : (void)(arg = line + strlen(line));
		while (i < sizeof commands / sizeof *commands && strcmp(commands[i].name, line))
			i++;
		if (i < sizeof commands / sizeof *commands)
			commands[i].f(arg);
		else
			say("error unknown command %.100s", line);
	}
	/* A child outlives its parent, but not the test, which holds the other end of our input. */
	struct pollfd p = {0, 0, 0};
	while (in != 0 && poll(&p, 1, -1) < 1)
		;
	_exit(0);
}

/* The main thread waits in read until it is told to end alone. */
void wait_as_leader(void)
{
	char c;
	while (read(leader_pipe[0], &c, 1) != 1)
		note_fault(FAULT, "read of the main thread", errno, 1);
	syscall(SYS_exit, 0);
}

__attribute__((constructor)) static void before_main(void)
{
	if (pipe2(leader_pipe, O_CLOEXEC) || readlink("/proc/self/exe", program, sizeof program - 1) < 0)
		die("pipe", NULL);
}

void trace(int pid)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/task", pid);
	DIR *d = opendir(path);
	if (!d)
		die("no such process", path);
	for (struct dirent *e; (e = readdir(d));)
		if (isdigit(e->d_name[0]) && ptrace(PTRACE_SEIZE, atoi(e->d_name), 0, 0))
			die("seize", e->d_name);
	closedir(d);
	say("ready %d 0 0", getpid());
	char line[64];
	while (read_line(0, line, sizeof line))
		;
	exit(0);
}
