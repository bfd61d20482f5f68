// Preloaded (LD_PRELOAD), this hides features of the processor from everything in the process that asks CPUID for them,
// so that engines without a switch for it run as they would on a smaller processor. Linux can let CPUID fault, on
// Intel's processors and in most virtual machines; the fault is answered here.
//
//     HIDE_CPUID=7.0.b.16,7.0.c.11     leaf 7, subleaf 0: bit 16 of EBX (AVX512F) and bit 11 of ECX (AVX512_VNNI)
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

struct hidden {
  unsigned leaf, subleaf, bit;
  char of;  // 'a' to 'd': EAX to EDX
};
static struct hidden hidden[64];
static int count;
static struct sigaction earlier;  // whoever else waits for SIGSEGV

static void fault(int number, siginfo_t* info, void* context) {
  greg_t* at = ((ucontext_t*)context)->uc_mcontext.gregs;
  const uint8_t* code = (const uint8_t*)at[REG_RIP];
  if (info->si_code != SI_KERNEL || code[0] != 0x0f || code[1] != 0xa2) {  // another fault than that of CPUID
    sigaction(number, &earlier, NULL);
    return;
  }
  const uint32_t leaf = at[REG_RAX], subleaf = at[REG_RCX];
  uint32_t found[4];
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
  __asm__ volatile("cpuid" : "=a"(found[0]), "=b"(found[1]), "=c"(found[2]), "=d"(found[3]) : "a"(leaf), "c"(subleaf));
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
  for (int i = 0; i < count; ++i) {
    if (hidden[i].leaf == leaf && hidden[i].subleaf == subleaf) found[hidden[i].of - 'a'] &= ~(1u << hidden[i].bit);
  }
  at[REG_RAX] = found[0];
  at[REG_RBX] = found[1];
  at[REG_RCX] = found[2];
  at[REG_RDX] = found[3];
  at[REG_RIP] += 2;
}

static void fail(const char* why) {
  fprintf(stderr, "hide_cpuid: %s\n", why);
  _exit(99);
}

__attribute__((constructor)) static void start(void) {
  const char* given = getenv("HIDE_CPUID");
  int length = 0;
  for (const char* from = given ? given : ""; *from; from += length + (from[length] == ',')) {
    struct hidden* next = &hidden[count++];
    if (count > 64) fail("HIDE_CPUID names more than 64 features");
    if (sscanf(from, "%u.%u.%c.%u%n", &next->leaf, &next->subleaf, &next->of, &next->bit, &length) != 4 ||
        next->of < 'a' || next->of > 'd' || next->bit > 31) {
      fail("HIDE_CPUID is no list of leaf.subleaf.register.bit");
    }
  }
  struct sigaction action = {0};
  action.sa_sigaction = fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &earlier);
  if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0) != 0) fail("this processor or kernel cannot let CPUID fault");
}
